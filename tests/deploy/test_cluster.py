import socket

import pytest

from deploy.cluster import ClusterError, ray_cluster
from deploy.sentinel import Sentinel


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("address", [f"127.0.0.1:{free_port()}", "nonsense", "host:port"])
def test_an_address_where_nothing_answers_is_one_clear_error(address: str) -> None:
    with Sentinel() as sentinel, pytest.raises(ClusterError, match="nothing answers at --ray"):
        with ray_cluster(address, cpus=1, sentinel=sentinel):
            pass
