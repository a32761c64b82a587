"""An address where nobody answers is told soon, and in our own words."""

from __future__ import annotations

import socket
import time

import pytest

from batchtrim.lab.execute import reach


def test_an_address_where_nothing_listens_is_refused_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for form in ("127.0.0.1:{}", "ray://127.0.0.1:{}"):
        with pytest.raises(ConnectionError):
            reach.check_address(form.format(port))
    with pytest.raises(ConnectionError):
        reach.check_address("nowhere.invalid:1234")
    with pytest.raises(ConnectionError):
        reach.check_address("127.0.0.1:99999")


def test_one_that_listens_and_other_forms_pass() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        reach.check_address(f"127.0.0.1:{server.getsockname()[1]}")
    reach.check_address("auto")
    reach.check_address("local")


def test_a_start_that_hangs_is_given_up() -> None:
    with pytest.raises(ConnectionError, match="no answer within"):
        reach.in_time(lambda: time.sleep(5), seconds=0.05)
    with pytest.raises(ValueError, match="mine"):
        reach.in_time(lambda: (_ for _ in ()).throw(ValueError("mine")).send(None))
    reach.in_time(lambda: None)
