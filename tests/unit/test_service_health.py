"""Where a server is asked, and what is made of its silence."""

from __future__ import annotations

import pytest

from composer.runtime.service.health import SILENT, address, ask
from composer.runtime.service.spec import ServiceError


@pytest.mark.parametrize("host", ["a..b", "a b", "x" * 64, "\x00"])
def test_a_host_that_can_be_none_does_not_answer(host):
    assert ask(host, 1) == SILENT


@pytest.mark.parametrize("command", [(), ("/none/sglang-serve",), ("/bin/false",)])
def test_the_variables_say_it_where_no_program_does(command):
    assert address({"SGLANG_HOST": "0.0.0.0", "SGLANG_PORT": "8000"}, command) == ("127.0.0.1", 8000)
    with pytest.raises(ServiceError, match="is no port"):
        address({"SGLANG_PORT": "0"}, command)


@pytest.mark.parametrize(
    "said",
    [
        "", "no JSON", "[]", '{"schema": 1, "status": 2}', '{"port": {"host": "h", "port": null}}',
        '{"port": {"host": "h", "port": 70000}}', '{"port": {"host": "h", "port": 1e999}}',
    ],
)  # fmt: skip
def test_a_program_that_does_not_say_it_is_not_believed(tmp_path, said):
    program = tmp_path / "sglang-serve"
    program.write_text(f"#!/bin/sh\necho '{said}'\n")
    program.chmod(0o755)
    assert address({"SGLANG_PORT": "8000"}, [str(program)]) == ("127.0.0.1", 8000)
