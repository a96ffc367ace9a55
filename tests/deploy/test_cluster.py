import os
import socket

import psutil
import pytest

from deploy.cluster import ClusterError, ray_cluster
from deploy.sentinel import Sentinel, members
from replay_service.security import is_loopback


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("address", [f"127.0.0.1:{free_port()}", "nonsense", "host:port"])
def test_an_address_where_nothing_answers_is_one_clear_error(address: str) -> None:
    with Sentinel() as sentinel, pytest.raises(ClusterError, match="nothing answers at --ray"):
        with ray_cluster(address, cpus=1, sentinel=sentinel):
            pass


@pytest.mark.integration
def test_a_private_ray_listens_on_loopback_alone() -> None:
    import ray

    with Sentinel() as sentinel, ray_cluster("local", cpus=1, sentinel=sentinel):
        worker = ray.remote(num_cpus=0)(lambda: os.getpid())
        assert ray.get(worker.remote(), timeout=60) != os.getpid()
        directories = [ray._private.worker._global_node.get_session_dir_path()]
        listening = {
            (process.name(), connection.laddr.ip)
            for process in members(sentinel.mark, directories)
            for connection in process.net_connections(kind="inet")
            if connection.status == psutil.CONN_LISTEN
        }
    assert len(listening) >= 3, listening
    beyond = [found for found in listening if not is_loopback(found[1].removeprefix("::ffff:"))]
    assert not beyond, beyond
