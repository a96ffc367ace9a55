#!lua name=dreamfleet_replay

-- Scripts are isolated but never rolled back: every function checks everything before it writes.
--
-- Keys of one shard share a hash tag, for example {rp0}:
--   meta     hash    schema, limits, counters, budget, fence, epoch
--   log      stream  one entry per committed chunk, id <epoch>-<number of the chunk>
--   seq      hash    stream -> last committed sequence number, with a trailing "c" once closed
--   payload  string  the encoded chunk; expires by itself until it is committed
--   wake     stream  its newest entry (the only one) is the last settlement; writers block on it
--   sd       hash    process -> until when its metrics count as live (ms), and where they are (JSON)

-- Epoch by meta key. Empty again after every load, restart or promotion, which no client could
-- tell reliably.
local booted = {}

local EVICT_CHUNKS = 8
local MOST_EXACT = 2 ^ 53 -- numbers below it are exact
-- Epochs from here on are nobody's: those of all restarts to come have to stay exact.
local MOST_EPOCH = MOST_EXACT - 2 ^ 20

-- What is no number, or none that counting can go on from, counts as 0: whoever may insert can write
-- it where counters are, and nobody's inserts may fail by it.
local function int(value)
  local number = tonumber(value) or 0
  return math.abs(number) <= MOST_EXACT and number or 0
end

local function whole(value)
  return string.format('%.0f', value)
end

-- An epoch that can be followed; whoever may insert can also write others.
local function usable(value)
  local epoch = int(value)
  return epoch > 0 and epoch < MOST_EPOCH and epoch or 0
end

-- Log ids must keep growing even if a restart has lost the end of the log, or somebody emptied the
-- server. In milliseconds, so that two lives of a server that keeps nothing cannot share one. It is
-- above `least`, if given.
local function new_epoch(meta, least)
  local now = redis.call('TIME')
  local known = math.max(usable(redis.call('HGET', meta, 'epoch')), usable(booted[meta]),
    usable(least))
  local epoch = whole(math.max(known + 1, int(now[1]) * 1000 + math.floor(int(now[2]) / 1000)))
  redis.call('HSET', meta, 'epoch', epoch)
  booted[meta] = epoch
end

local function ensure_epoch(meta)
  if not booted[meta] then new_epoch(meta) end
  return booted[meta]
end

-- Forget a closed stream together with its last chunk, else the hash would grow for ever.
local function forget_closed(seqs, sid, seq)
  if redis.call('HGET', seqs, sid) == seq .. 'c' then redis.call('HDEL', seqs, sid) end
end

-- Whether an entry is one that insert has written: whoever may insert can also add others. `shard`
-- is what all keys begin with.
local function genuine(entry, shard)
  return #entry == 12 and entry[1] == 'k' and entry[3] == 'n' and entry[5] == 'b'
    and entry[7] == 's' and entry[9] == 'q'
    and entry[2] == shard .. 'c:' .. entry[8] .. ':' .. entry[10]
    and string.find(entry[4], '^%d+$') and string.find(entry[6], '^%d+$')
end

-- Drop whole chunks from the old end of a log of `size` steps and `held` bytes until `steps` and
-- `bytes` fit. At most `most` chunks, or as many as free `least` steps, so that lowering a limit
-- never stalls the server. `open` is a stream that has more chunks and is not closed.
-- Returns what was freed: chunks, steps, bytes, and the ids of the entries, which the caller deletes
-- and counts, with those of entries that insert has not written.
local function evict(log, seqs, size, held, steps, bytes, least, most, open)
  local chunks, freed, freed_bytes = 0, 0, 0
  local from, ids, shard = '-', {}, string.sub(seqs, 1, -4)
  while (size - freed > steps or held - freed_bytes > bytes)
      and (#ids < most or freed < least) do
    local oldest = redis.call('XRANGE', log, from, '+', 'COUNT', 1)[1]
    if not oldest then break end
    local entry = oldest[2] -- k n b s q g, each before its value, as insert writes them
    from = '(' .. oldest[1]
    ids[#ids + 1] = oldest[1]
    if genuine(entry, shard) then
      -- Freeing one string is immediate; a background thread would only cost locality.
      redis.call('DEL', entry[2])
      if entry[8] ~= open then forget_closed(seqs, entry[8], entry[10]) end
      chunks = chunks + 1
      freed = math.min(freed + int(entry[4]), size)
      freed_bytes = math.min(freed_bytes + int(entry[6]), held)
    end
  end
  return chunks, freed, freed_bytes, ids
end

-- A stream begins: nobody else may get its incarnation, also if a power cut took from the log that
-- its writer did.
local function claim(meta, sid)
  local name, incarnation = string.match(sid, '^(.*)@(%d+)$')
  if not name then return end
  local field = 'incarnation:' .. name
  if int(redis.call('HGET', meta, field)) < int(incarnation) then
    redis.call('HSET', meta, field, incarnation)
  end
end

-- KEYS meta; ARGV schema hash, schema text, capacity steps, capacity bytes, min size, budget,
-- longest chunk, largest chunk in bytes, the lowest incarnation of streams that begin from now on,
-- for a replay whose contents are to be put back first the token of whoever does (see restore) or
-- "", for whom it is (a word that no other has, and words about it) or "", and "1" to take it from
-- another. Repeating it only updates the limits.
-- Replies: OK 1 if it is new, else 0 | SCHEMA text | OWNED owner.
local function create(keys, args)
  local meta, owner = keys[1], args[11] or ''
  local known = redis.call('HGET', meta, 'schema')
  local before = redis.call('HGET', meta, 'owner') or ''
  local same = string.match(before, '%S+') == string.match(owner, '%S+')
  if owner ~= '' and before ~= '' and not same and args[12] ~= '1' then
    return {'OWNED', before}
  end
  if known and known ~= args[1] then
    return {'SCHEMA', redis.call('HGET', meta, 'schema_text')}
  end
  if not known then
    redis.call('HSET', meta, 'schema', args[1], 'schema_text', args[2], 'budget', args[6],
      'fence', 0, 'sampled', 0, 'sampled_fence', 0, 'inserted', 0, 'size', 0, 'bytes', 0,
      'chunks', 0, 'evicted', 0, 'committed', 0)
  end
  redis.call('HSET', meta, 'cap_steps', args[3], 'cap_bytes', args[4], 'min_size', args[5],
    'max_steps', args[7], 'max_bytes', args[8])
  if int(args[9]) > int(redis.call('HGET', meta, 'incarnations_from')) then
    redis.call('HSET', meta, 'incarnations_from', args[9])
  end
  if owner ~= '' then redis.call('HSET', meta, 'owner', owner) end
  if known then
    ensure_epoch(meta)
  else
    new_epoch(meta)
    -- A replay that was lost and created again is told from the one before by this.
    redis.call('HSET', meta, 'born', booted[meta])
    if args[10] and args[10] ~= '' then redis.call('HSET', meta, 'restoring', args[10]) end
  end
  return {'OK', known and 0 or 1}
end

-- Count an answer that inserted nothing, for whoever watches.
local function refused(meta, field)
  redis.call('HSET', meta, field, whole(int(redis.call('HGET', meta, field)) + 1))
end

-- Keep the payload of a chunk, which came with the call or was sent before. Says whether it is there.
local function keep(payload, bytes, blob)
  if blob then
    if #blob ~= bytes then return false end
    redis.call('SET', payload, blob)
    return true
  end
  local stored = redis.call('STRLEN', payload)
  if stored == bytes then
    redis.call('PERSIST', payload)
    return true
  end
  -- Left behind by another writer that never committed it; the caller sends its own.
  if stored > 0 then redis.call('DEL', payload) end
  return false
end

-- Append entry `number` to the log, and drop those up to the id `last` if there is one. Says whether
-- it could: behind an entry with the highest ids, which insert has not written, no other can stand.
local function append(meta, log, number, last, ...)
  local trim, fields = {}, {...}
  if last then
    -- No id lies between this one and the next entry's, so that exactly what was evicted goes.
    local epoch, at = string.match(last, '(%d+)-(%d+)')
    local exact = int(at) < MOST_EXACT
    local first = exact and epoch .. '-' .. whole(at + 1) or whole(epoch + 1) .. '-0'
    trim = {'MINID', '=', first}
  end
  local function added()
    local words = {unpack(trim)}
    words[#words + 1] = booted[meta] .. '-' .. number
    for _, word in ipairs(fields) do words[#words + 1] = word end
    local reply = redis.pcall('XADD', log, unpack(words))
    if type(reply) ~= 'table' or not reply.err then return true end
    if string.find(reply.err, 'ID specified') or string.find(reply.err, 'last possible ID') then
      return false
    end
    -- Anything else, such as a right that is missing, is for the caller.
    return redis.call('XADD', log, unpack(words)) ~= nil
  end
  if added() then return true end
  -- An entry that insert has not written may stand where this one belongs: go on behind it.
  local newest = redis.call('XREVRANGE', log, '+', '-', 'COUNT', 1)[1]
  new_epoch(meta, newest and string.match(newest[1], '^%d+'))
  return added()
end

-- What is kept of a stream: the number of its last chunk, and "c" or "". Nothing if whoever may insert
-- has put something else there.
local function last_of(seqs, sid)
  local last, closed = string.match(redis.call('HGET', seqs, sid) or '0', '^(%d+)(c?)$')
  if last and tonumber(last) < MOST_EXACT then return tonumber(last), closed end
end

-- KEYS meta, log, seq, payload; ARGV schema hash, stream, sequence number, steps, bytes, the token
-- of a learner that puts back what was lost (while it does, only it may insert) or "", and the
-- payload, unless it was sent before: through a function only small ones are quick.
-- Replies: OK inserted | DUP last | GAP last | ODD (nobody knows what the stream's last chunk is) |
-- WAIT budget inserted wake | SCHEMA text | TOOBIG steps bytes | NOPAYLOAD | FENCED (that token counts
-- no more) | NONE (no replay has been created) | NONE reason. The wake of a WAIT is the id after which the next settlement appears.
local function insert(keys, args)
  local meta, log, seqs, payload = keys[1], keys[2], keys[3], keys[4]
  local sid, seq, steps, bytes = args[2], int(args[3]), int(args[4]), int(args[5])
  local m = redis.call('HMGET', meta, 'schema', 'max_steps', 'max_bytes', 'cap_steps',
    'cap_bytes', 'min_size', 'budget', 'inserted', 'size', 'bytes', 'chunks', 'evicted',
    'committed', 'wake', 'inserted_bytes', 'restoring')
  if not m[1] then return {'NONE'} end
  if m[1] ~= args[1] then return {'SCHEMA', redis.call('HGET', meta, 'schema_text')} end
  local restoring = args[6] ~= '' and args[6]
  if m[16] ~= restoring then
    if restoring then return {'FENCED'} end
    return {'NONE', 'the learner is putting back what the server has lost'}
  end

  local last, closed = last_of(seqs, sid)
  if not last then return {'ODD'} end
  if seq <= last then
    refused(meta, 'dups')
    return {'DUP', last}
  end
  if seq ~= last + 1 then
    refused(meta, 'gaps')
    return {'GAP', last}
  end

  local cap_steps, cap_bytes = int(m[4]), int(m[5])
  local most_steps, most_bytes = math.min(int(m[2]), cap_steps), math.min(int(m[3]), cap_bytes)
  -- What is put back was admitted once, perhaps under other limits.
  if restoring then most_steps, most_bytes = cap_steps, cap_bytes end
  if steps < 1 or steps > most_steps or bytes > most_bytes then
    return {'TOOBIG', most_steps, most_bytes}
  end
  local budget, inserted, size, held = int(m[7]), int(m[8]), int(m[9]), int(m[10])
  if not restoring and size >= int(m[6]) and inserted + steps > budget then
    refused(meta, 'waits')
    return {'WAIT', budget, inserted, m[14] or '0-0'}
  end
  if not keep(payload, bytes, args[7]) then return {'NOPAYLOAD'} end

  ensure_epoch(meta)
  local gone, freed, freed_bytes, ids = evict(log, seqs, size, held, cap_steps - steps,
    cap_bytes - bytes, steps, EVICT_CHUNKS, closed == '' and sid)
  if last == 0 then claim(meta, sid) end
  local number = int(m[13]) + 1
  if not append(meta, log, whole(number), ids[#ids], 'k', payload, 'n', args[4], 'b', args[5], 's',
      sid, 'q', args[3], 'g', whole(inserted)) then
    return {'NONE', 'an entry of the log that no insert has made leaves no higher id for others: '
      .. '`dreamfleet replay check` names it, docs/security.md says how to mend it'}
  end
  -- A writer that was replaced may still come; its stream stays one that is to be forgotten.
  redis.call('HSET', seqs, sid, whole(seq) .. closed)
  redis.call('HSET', meta, 'inserted', whole(inserted + steps), 'committed', whole(number),
    'size', whole(size + steps - freed), 'bytes', whole(held + bytes - freed_bytes),
    'chunks', whole(int(m[11]) + 1 - gone), 'evicted', whole(int(m[12]) + freed),
    'inserted_bytes', whole(int(m[15]) + bytes))
  return {'OK', inserted + steps}
end

-- No more chunks of a stream will come: remember it only as long as its last chunk is there, the
-- payload `last_key`.
local function retire(seqs, sid, last, last_key)
  -- One that would expire by itself is no chunk: it was evicted, and its writer has sent it again.
  if redis.call('PERSIST', last_key) == 1 then redis.call('DEL', last_key) end
  if redis.call('EXISTS', last_key) == 1 then
    redis.call('HSET', seqs, sid, last .. 'c')
  else
    redis.call('HDEL', seqs, sid)
  end
end

-- KEYS meta, seq; ARGV stream name, lowest incarnation wanted.
-- Returns an incarnation that nobody else has, and closes the one before.
local function open_stream(keys, args)
  local meta, seqs = keys[1], keys[2]
  local field = 'incarnation:' .. args[1]
  local m = redis.call('HMGET', meta, field, 'incarnations_from')
  local before = m[1]
  local fresh = math.max(int(before) + 1, int(args[2]), int(m[2]))
  redis.call('HSET', meta, field, whole(fresh))
  if before then
    local sid = args[1] .. '@' .. before
    local last = redis.call('HGET', seqs, sid)
    if last and not string.find(last, 'c') then
      retire(seqs, sid, last, string.sub(seqs, 1, -4) .. 'c:' .. sid .. ':' .. last)
    end
  end
  return {'OK', fresh}
end

-- KEYS seq, payload of the stream's last chunk; ARGV stream.
local function close_stream(keys, args)
  local seqs, sid = keys[1], args[1]
  local last = redis.call('HGET', seqs, sid)
  if not last or string.find(last, 'c') then return {'OK'} end
  retire(seqs, sid, last, keys[2])
  return {'OK'}
end

-- KEYS meta; ARGV lowest fence wanted. Returns a fence above every earlier one.
local function fence(keys, args)
  local m = redis.call('HMGET', keys[1], 'schema', 'fence')
  if not m[1] then return {'NONE'} end
  local step = math.max(int(args[1]) - int(m[2]), 1)
  return {'OK', redis.call('HINCRBY', keys[1], 'fence', whole(step))}
end

-- KEYS meta, seq; ARGV fence, token, steps in all, steps of them to be put back, replayed steps,
-- budget, then for each stream its name, incarnation, last chunk that will not be put back, and "c"
-- or "". Begins to put back what a server has lost, into a replay that has no chunk yet: from now on
-- only inserts with the token are taken. The account goes on; steps that are not put back count as
-- evicted; writers go on after the chunks that are said to have been there.
-- Replies: OK, then the last chunk of each stream that is there | BUSY chunks | FENCED fence | NONE.
-- With the same token it changes nothing, so that it can be continued.
local function restore(keys, args)
  local meta, seqs, token = keys[1], keys[2], args[2]
  local m = redis.call('HMGET', meta, 'schema', 'fence', 'committed', 'restoring', 'restoring_to',
    'born', 'incarnations_from')
  if not m[1] then return {'NONE'} end
  if int(args[1]) < int(m[2]) then return {'FENCED', int(m[2])} end
  local begun = m[4] == token and m[5]
  if not begun then
    if int(m[3]) > 0 then return {'BUSY', int(m[3])} end
    local before = whole(int(args[3]) - int(args[4]))
    -- Of incarnations without any chunk nobody knows; no stream begins a new one every second.
    local from = math.max(math.floor(int(m[6]) / 1000), int(m[7]))
    redis.call('HSET', meta, 'restoring', token, 'restoring_to', args[3], 'fence', args[1],
      'sampled', args[5], 'sampled_fence', args[1], 'budget', args[6], 'inserted', before,
      'evicted', before, 'incarnations_from', whole(from))
  end
  local reply = {'OK'}
  for i = 7, #args, 4 do
    local name, life, last, closed = args[i], args[i + 1], args[i + 2], args[i + 3]
    local sid = name .. '@' .. life
    if not begun then
      claim(meta, sid)
      redis.call('HSET', seqs, sid, last .. closed)
    end
    reply[#reply + 1] = int(string.match(redis.call('HGET', seqs, sid) or '0', '%d+'))
  end
  return reply
end

-- KEYS meta; ARGV fence. Lets everybody insert again, whether or not everything was put back.
-- Replies: OK inserted | FENCED fence | NONE.
local function restored(keys, args)
  local meta = keys[1]
  local m = redis.call('HMGET', meta, 'schema', 'fence', 'inserted')
  if not m[1] then return {'NONE'} end
  if int(args[1]) < int(m[2]) then return {'FENCED', int(m[2])} end
  redis.call('HDEL', meta, 'restoring', 'restoring_to')
  return {'OK', int(m[3])}
end

-- KEYS meta, wake; ARGV fence, replayed steps, budget, turn. Replies: OK inserted size | FENCED fence
-- | NONE. A late or repeated call changes nothing; a new fence may move the account back. A fence
-- above the known one is that of a learner whose beginning a power cut took from the log: it stays in
-- charge. One that shares a budget out over several servers numbers its calls to each from 1 on: a
-- smaller budget, once acknowledged, is then not replaced by an earlier call that comes late, be it
-- one without a number, from before there were several.
local function settle(keys, args)
  local meta = keys[1]
  local m = redis.call('HMGET', meta, 'schema', 'fence', 'sampled', 'sampled_fence', 'inserted',
    'size', 'turn')
  if not m[1] then return {'NONE'} end
  if int(args[1]) < int(m[2]) then return {'FENCED', int(m[2])} end
  if int(args[1]) > int(m[2]) then redis.call('HSET', meta, 'fence', args[1]) end
  local turn, known = int(args[4]), int(m[7])
  local late = int(args[2]) < int(m[3]) or (known > 0 and turn <= known)
  if int(m[4]) ~= int(args[1]) or not late then
    local id = redis.call('XADD', keys[2], 'MAXLEN', 1, '*', 'budget', args[3])
    redis.call('HSET', meta, 'sampled', args[2], 'sampled_fence', args[1], 'budget', args[3],
      'wake', id, 'turn', whole(turn))
  end
  return {'OK', int(m[5]), int(m[6])}
end

-- KEYS meta.
local function stats(keys)
  return redis.call('HGETALL', keys[1])
end

-- KEYS meta, log, seq; ARGV steps and bytes to shrink to, most chunks to drop.
local function shrink(keys, args)
  local meta = keys[1]
  local m = redis.call('HMGET', meta, 'size', 'bytes')
  local chunks, freed, freed_bytes, ids = evict(keys[2], keys[3], int(m[1]), int(m[2]),
    int(args[1]), int(args[2]), 0, int(args[3]))
  if #ids > 0 then
    for _, id in ipairs(ids) do redis.call('XDEL', keys[2], id) end
    redis.call('HINCRBY', meta, 'size', whole(-freed))
    redis.call('HINCRBY', meta, 'bytes', whole(-freed_bytes))
    redis.call('HINCRBY', meta, 'chunks', whole(-chunks))
    redis.call('HINCRBY', meta, 'evicted', whole(freed))
  end
  return {'OK', chunks, freed, freed_bytes}
end

-- Milliseconds of this server's clock: those of the processes that register may disagree.
local function now_ms()
  local now = redis.call('TIME')
  return int(now[1]) * 1000 + math.floor(int(now[2]) / 1000)
end

-- KEYS sd; ARGV process, milliseconds for which it counts as live (0 takes it out), where and what
-- it is. Whoever has not come back in time goes too.
local function register(keys, args)
  local now = now_ms()
  local known = redis.call('HGETALL', keys[1])
  for i = 1, #known, 2 do
    if int(string.match(known[i + 1], '^%d+')) <= now then redis.call('HDEL', keys[1], known[i]) end
  end
  if int(args[2]) > 0 then
    redis.call('HSET', keys[1], args[1], whole(now + int(args[2])) .. ' ' .. args[3])
  else
    redis.call('HDEL', keys[1], args[1])
  end
  return {'OK'}
end

-- KEYS sd. Returns process, where and what it is, of all that are live.
local function endpoints(keys)
  local found, now = {}, now_ms()
  local known = redis.call('HGETALL', keys[1])
  for i = 1, #known, 2 do
    local till, text = string.match(known[i + 1], '^(%d+) (.*)$')
    if int(till) > now then
      found[#found + 1] = known[i]
      found[#found + 1] = text
    end
  end
  return found
end

-- KEYS payloads. Returns their sizes in bytes, 0 where there is none. One reply for all: to a client
-- the reply of a command costs more than the measuring.
local function sizes(keys)
  local found = {}
  for i, key in ipairs(keys) do found[i] = redis.call('STRLEN', key) end
  return found
end

-- KEYS meta. Writes nothing: the server refuses to call it whenever it would refuse an insert,
-- because it has no memory or disk left, or is a replica.
local function admits(keys)
  return {'OK'}
end

redis.register_function('replay_insert', insert)
redis.register_function('replay_admits', admits)
redis.register_function('replay_open', open_stream)
redis.register_function('replay_close', close_stream)
redis.register_function{function_name='replay_create', callback=create, flags={'allow-oom'}}
redis.register_function{function_name='replay_fence', callback=fence, flags={'allow-oom'}}
redis.register_function{function_name='replay_restore', callback=restore, flags={'allow-oom'}}
redis.register_function{function_name='replay_restored', callback=restored, flags={'allow-oom'}}
redis.register_function{function_name='replay_settle', callback=settle, flags={'allow-oom'}}
redis.register_function{function_name='replay_evict', callback=shrink, flags={'allow-oom'}}
redis.register_function{function_name='replay_register', callback=register, flags={'allow-oom'}}
redis.register_function{function_name='replay_endpoints', callback=endpoints, flags={'no-writes'}}
redis.register_function{function_name='replay_sizes', callback=sizes, flags={'no-writes'}}
redis.register_function{function_name='replay_stats', callback=stats, flags={'no-writes'}}
