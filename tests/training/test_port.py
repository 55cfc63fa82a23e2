"""A port that another run has is one sentence."""

import socket

import pytest

from psa_fast.training.engine import init_distributed


def test_a_taken_port_is_a_sentence_that_names_the_option(monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        given = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=f"port {port} is taken, .* deepspeed --master_port N train.py"):
            init_distributed()
