from typing import Any

import pytest
import torch

from dreamer import ops
from dreamer.agent import make_agent
from dreamer.presets import agent_config, with_fields
from dreamer.spaces import ImageSpec, ObsSpace
from tests.dreamer.cases import TURN, VECTOR, batch_of, close, golden

PIXELS: ObsSpace = {"image": ImageSpec(shape=(64, 64, 3)), **VECTOR}


def build(name: str = "pro", obs: ObsSpace = VECTOR, **values: Any) -> Any:
    torch.manual_seed(0)
    return make_agent(with_fields(agent_config(name, "debug"), values), obs, TURN)


def test_cross_entropy_matches_the_golden_number() -> None:
    given, want = golden("sinkhorn_eps0.5")
    scores = torch.tensor(given["scores"]).T
    targets = ops.sinkhorn(scores, given["eps"], given["iters"])
    loss = -(targets * torch.log_softmax(scores / 0.1, -1)).sum(-1).mean()
    close(loss, golden("proto_cross_entropy")[1]["temp_loss"], rtol=1e-4)
    assert want is not None


def test_norm_loss_matches_the_golden_number() -> None:
    given, want = golden("proto_norm_loss")
    norms = torch.tensor(given["proj"]).norm(dim=-1)
    close(norms, want["norms"])
    close((norms - 1).square().mean(), want["norm_loss"])


def test_prototypes_that_move_stay_on_the_sphere() -> None:
    agent = build(**{"prototypes.freeze": 0})
    before = agent.prototypes.centres.detach().clone()
    agent.update(batch_of(agent))
    assert not torch.allclose(agent.prototypes.centres, before, rtol=1e-5, atol=1e-6)
    close(agent.prototypes.centres.norm(dim=-1), torch.ones(16), rtol=1e-5)


def test_the_teacher_follows_at_the_golden_rate() -> None:
    given, want = golden("ema_encoder")
    agent = build(**{"prototypes.ema_rate": given["rate"]})
    module = agent.prototypes
    module.count += 1  # the first update is behind it
    with torch.no_grad():
        module.slow_proj.weight.zero_()
        module.embed_proj.weight.fill_(1.0)
    found = []
    for _ in range(3):
        module.move(agent.encoder)
        found.append(module.slow_proj.weight[0, 0].item())
    close(torch.tensor(found), want["after_1_2_3"], rtol=1e-5)


@pytest.mark.parametrize("name", ["pro", "pro-v3"])
def test_the_first_update_makes_the_teacher_a_copy_of_the_student_and_no_later_one_does(
    name: str,
) -> None:
    agent = build(name)
    module = agent.prototypes
    pairs = [(module.slow_encoder, agent.encoder), (module.slow_proj, module.embed_proj)]

    def equal() -> list[bool]:
        return [
            torch.equal(kept, new)
            for slow, fast in pairs
            for kept, new in zip(slow.parameters(), fast.parameters(), strict=True)
        ]

    with torch.no_grad():
        for slow, _ in pairs:
            for param in slow.parameters():
                param.normal_()
    agent.update(batch_of(agent))
    assert all(equal())
    agent.update(batch_of(agent))
    assert not any(equal())


@pytest.mark.parametrize("whole", [False, True])
def test_views_shift_a_sequence_as_one_and_each_view_by_itself(whole: bool) -> None:
    agent = build(obs=PIXELS, **{"prototypes.whole_pixels": whole})
    batch = batch_of(agent)
    ramp = torch.arange(64, dtype=torch.uint8)[None, None, None, :, None] * 2
    batch.obs["image"] = ramp.expand(2, 6, 64, 64, 3).contiguous()
    torch.manual_seed(0)
    views = agent.prototypes.views(batch)
    assert views.obs["image"].shape == (4, 6, 64, 64, 3)
    assert torch.equal(views.obs["vector"], torch.cat([batch.obs["vector"]] * 2))
    shift = (ramp[0, 0, 0, 32, 0] - views.obs["image"][:, :, 32, 32, 0]) / 2.0
    assert (shift == shift[:, :1]).all() and shift.abs().max() <= 3.0
    assert len(set(shift[:, 0].tolist())) > 1
    assert whole == torch.allclose(shift, shift.round(), atol=1e-3)


def test_published_pro_learns_everything_from_the_views_and_on_v3_only_the_prototypes_do() -> None:
    published, on_v3 = build(obs=PIXELS), build("pro-v3", obs=PIXELS)
    assert published.update(batch_of(published))[1] == {}
    _, latents = on_v3.update(batch_of(on_v3))
    assert latents["deter"].shape[:2] == (2, 6)
    with pytest.raises(ValueError, match="'augmented' has no latent of its own"):
        build("pro-v3", **{"prototypes.rollout": "augmented"})


def test_usage_of_prototypes_is_measured() -> None:
    agent = build()
    metrics, _ = agent.update(batch_of(agent))
    assert 1 <= metrics["prototypes/live"] <= 16
    assert 0 <= metrics["prototypes/entropy_nats"] <= metrics["prototypes/mean_entropy_nats"] + 1e-4
