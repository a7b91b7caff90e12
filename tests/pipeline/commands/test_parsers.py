"""The parsers: of one command for who runs it, of all for who describes them; options that every command has."""

from __future__ import annotations

import logging

import pytest

from pipeline.cli import main
from pipeline.commands.all_commands import COMMANDS, TABLE_FORMS
from pipeline.commands.parsers import command_parsers, parser_for, whole_parser


def test_every_command_describes_itself_and_every_option() -> None:
    """What a generated reference is made from."""
    parsers = command_parsers()
    assert set(parsers) == {*COMMANDS, *(f"{name} --table" for name in TABLE_FORMS)}
    for name, parser in parsers.items():
        assert parser.prog == f"dualign {name.removesuffix(' --table')}"
        assert parser.description
        assert "examples:" in str(parser.epilog)
        for action in parser._actions:
            assert action.help, (name, action)
        assert max(map(len, str(parser.epilog).splitlines())) <= 80


def test_the_whole_has_every_option_of_every_command() -> None:
    options, rest = whole_parser().parse_known_args(["solve", "--table", "x.csv", "--config", "c.yaml"])
    assert not rest
    assert str(options.config) == "c.yaml"
    assert str(options.table) == "x.csv"


def test_quiet_and_verbose_stand_before_or_after_the_command() -> None:
    for arguments in (["-q", "env"], ["env", "-q"], ["env", "--quiet"]):
        options, _ = parser_for(arguments).parse_known_args(arguments)
        assert options.quiet
    options, _ = parser_for(["env"]).parse_known_args(["env"])
    assert not hasattr(options, "quiet")


def test_the_two_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["env", "-q", "-v"])
    assert ended.value.code == 2
    assert "not allowed with" in capsys.readouterr().err


def test_verbose_says_where_an_error_comes_from_and_quiet_keeps_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TQDM_DISABLE", "TRANSFORMERS_VERBOSITY", "TORCH_CPP_LOG_LEVEL", "VLLM_LOGGING_LEVEL"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "")  # undone afterwards, whatever the command sets
    assert main(["show", "no-such-run", "-v"]) == 2
    assert "Traceback" in capsys.readouterr().err
    assert main(["show", "no-such-run", "-q"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert "there is no run 'no-such-run'" in err
    assert logging.getLogger("dualign").level == logging.WARNING
    assert main(["env"]) == 0
    assert logging.getLogger("dualign").level == logging.INFO


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "usage: dualign" in captured.err
    assert all(name in captured.err for name in COMMANDS)
