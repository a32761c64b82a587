"""An address that does not answer is reported soon, and in our own words."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest

from batchtrim.lab.execute import bounded_wait


def test_an_address_where_nothing_listens_is_refused_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for form in ("127.0.0.1:{}", "ray://127.0.0.1:{}"):
        with pytest.raises(ConnectionError):
            bounded_wait.check_address(form.format(port))
    with pytest.raises(ConnectionError):
        bounded_wait.check_address("nowhere.invalid:1234")
    with pytest.raises(ConnectionError):
        bounded_wait.check_address("127.0.0.1:99999")


@pytest.mark.parametrize("address", ["ray://", "ray://nowhere", "ray://:10001", "ray://nowhere:port"])
def test_an_address_without_host_or_port_is_reported_before_ray_waits_for_it(address: str) -> None:
    with pytest.raises(ConnectionError, match="ray://HOST:10001"):
        bounded_wait.check_address(address)


def test_a_start_that_was_given_up_does_not_hold_the_end_of_the_process() -> None:
    code = (
        "import atexit, sys, time\n"
        "from batchtrim.lab.execute import bounded_wait\n"
        "def command():\n"
        "    try:\n"
        "        bounded_wait.in_time(lambda: time.sleep(50), seconds=0.1)\n"
        "    except ConnectionError as error:\n"
        "        print(error)\n"
        "        sys.exit(2)\n"
        "atexit.register(time.sleep, 50)  # as the thread of a library holds the interpreter's end\n"
        "bounded_wait.call_and_leave(command)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=40)
    assert (done.returncode, done.stderr) == (2, "")
    assert done.stdout == "no answer within 0 seconds\n"


def test_a_command_without_one_ends_as_ever() -> None:
    with pytest.raises(SystemExit) as end:
        bounded_wait.call_and_leave(lambda: sys.exit(3))
    assert end.value.code == 3
    bounded_wait.call_and_leave(lambda: None)


def test_what_a_library_writes_while_it_waits_is_not_shown(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConnectionError):
        bounded_wait.in_time(lambda: (os.write(2, b"gcs_client.cc:210\n"), time.sleep(5)), seconds=0.2)
    os.write(2, b"shown\n")
    assert capfd.readouterr().err == "shown\n"


def test_one_that_listens_and_other_forms_pass() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        bounded_wait.check_address(f"127.0.0.1:{server.getsockname()[1]}")
    bounded_wait.check_address("auto")
    bounded_wait.check_address("local")


def test_a_start_that_hangs_is_given_up() -> None:
    with pytest.raises(ConnectionError, match="no answer within"):
        bounded_wait.in_time(lambda: time.sleep(5), seconds=0.05)
    with pytest.raises(ValueError, match="mine"):
        bounded_wait.in_time(lambda: (_ for _ in ()).throw(ValueError("mine")).send(None))
    bounded_wait.in_time(lambda: None)
