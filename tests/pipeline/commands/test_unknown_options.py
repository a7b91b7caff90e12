"""Options that a command does not have: what was meant, or which command has them."""

from __future__ import annotations

import pytest

from pipeline.cli import main
from pipeline.commands.unknown_options import options_by_command, require_no_more
from pipeline.contracts.errors import ConfigError

pytestmark = pytest.mark.slow


def test_every_command_is_known_with_its_options() -> None:
    known = options_by_command()
    assert "--require-satisfied" in known["evaluate"]
    assert {"--table", "--force"} <= set(known["solve --table"])
    assert "--table" not in known["solve"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["solve", "--tabel", "x.csv"], "`dualign solve` has no option `--tabel`; did you mean `--table`?"),
        (
            ["solve", "--require-satisfied"],
            "`dualign solve` has no option `--require-satisfied`; it is an option of `dualign evaluate`",
        ),
        (
            ["solve", "--constraint", "g >= 0"],
            "it is an option of `dualign solve --table`, `dualign plan --table`, `dualign frontier`",
        ),
        (["train", "--redoo"], "`dualign train` has no option `--redoo`; did you mean `--redo`?"),
        (["stage1", "--redo"], "`dualign stage1` has no option `--redo`; it is an option of `dualign prepare`"),
        (["show", "--jsn"], "`dualign show` has no option `--jsn`; did you mean `--json`?"),
        (["env", "--zebra"], "`dualign env` has no option `--zebra`; `dualign env --help` lists them"),
        (["env", "stray"], "`dualign env` takes no more arguments, 'stray' given"),
        (["slove"], "there is no command 'slove'; did you mean `dualign solve`?"),
        (["--config", "my.yaml", "solve"], "there is no command 'my.yaml'; the command comes first"),
    ],
)
def test_what_was_meant_is_said(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(given) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_a_required_option_that_is_misspelt(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["solve", "--table", "x", "--rewrad", "r", "--constraint", "g >= 0", "--beta", "1", "--output", "o"])
    assert ended.value.code == 2
    assert "there is no option `--rewrad`; did you mean `--reward`?" in capsys.readouterr().err


def test_all_faults_come_together() -> None:
    with pytest.raises(ConfigError) as caught:
        require_no_more(["--sead", "3", "--outptu=x"], command="solve --table")
    assert len(caught.value.faults) == 2
