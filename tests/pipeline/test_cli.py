"""Every fault a user can make gets one clear message and its exit code, before any model is loaded."""

import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipeline
from pipeline.cli import main
from pipeline.commands.all_commands import COMMANDS
from pipeline.contracts.artifacts import run_lock
from pipeline.contracts.errors import InputError
from pipeline.steps.order import STAGES, SUMMARIES

pytestmark = pytest.mark.slow

RECIPE = """
beta: 1.0
prompts: {source: PROMPTS}
reference: {model: REFERENCE}
scorers:
  helpful: {model: SCORER}
  harmless: {model: SCORER}
reward: helpful
constraints:
  harmless: {direction: ">=", margin: 0.5}
"""


@pytest.fixture
def recipe(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(40)))
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE.replace("PROMPTS", str(prompts)))
    return path


def run(*arguments, tmp_path):
    return main([*map(str, arguments), "--data-dir", str(tmp_path / "data"), "--no-progress"])


@pytest.mark.parametrize("command", ["prepare", "sample", "stage1", "run", "train"])
def test_a_model_that_is_not_there_is_named_before_anything_runs(recipe, tmp_path, capsys, command):
    text = recipe.read_text().replace("REFERENCE", "./no-such-model").replace("SCORER", "./no-scorer")
    recipe.write_text(text)
    assert run(command, "--config", recipe, tmp_path=tmp_path) == 2
    err = capsys.readouterr().err
    if command == "train":
        assert "`dualign train` needs the step `prepare`" in err
    else:
        assert "`reference.model` is './no-such-model'; there is no such folder" in err
    assert not (tmp_path / "data" / "models").exists()


def test_a_scorer_that_is_not_a_checkpoint_is_named(recipe, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    recipe.write_text(
        recipe.read_text().replace("REFERENCE", "embedded:reference").replace("SCORER", str(tmp_path / "empty"))
    )
    assert run("stage1", "--config", recipe, tmp_path=tmp_path) == 2
    assert "config.json" in capsys.readouterr().err
    assert not (tmp_path / "data" / "models").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samplin.max_new_tokens", "3"], "unknown setting `samplin`; did you mean `sampling`?"),
        (["--beta", "0"], "`beta` is 0"),
        (["--beta"], "`--beta` has no value"),
        (["--beta", "1", "--beta", "2"], "`--beta` is given twice"),
        (["stray"], "unexpected argument 'stray'"),
        (["--reward", "helpfull"], "did you mean `helpful`?"),
        (["--config", "embeded"], "did you mean `embedded`?"),
        (["--constraints.harmless.threshold", "0"], "gives both of `threshold` and `margin`"),
    ],
)
def test_faults_of_the_command_line(tmp_path, capsys, arguments, message):
    assert run("stage1", *arguments, tmp_path=tmp_path) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_settings_are_taken_with_and_without_equals(tmp_path, capsys):
    for arguments in (["--beta=-1"], ["--beta", "-1"]):
        assert run("solve", *arguments, tmp_path=tmp_path) == 2
        assert "`beta` is -1" in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "data").write_text("a file")
    assert run("stage1", tmp_path=tmp_path) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_second_process_on_a_run(tmp_path, capsys):
    folder = tmp_path / "data" / "runs" / "embedded"
    folder.mkdir(parents=True)
    with run_lock(folder):
        assert run("stage1", tmp_path=tmp_path) == 2
    assert "is in use by another process" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "needed"), [("sample", "prepare"), ("solve", "prepare"), ("report", "solve")])
def test_a_step_names_the_step_it_needs(tmp_path, capsys, command, needed):
    assert run(command, tmp_path=tmp_path) == 2
    assert f"needs the step `{needed}` of run `embedded`" in capsys.readouterr().err


def test_require_satisfied_without_an_evaluation(tmp_path, capsys):
    assert run("evaluate", "--require-satisfied", tmp_path=tmp_path) == 2
    assert "needs the step" in capsys.readouterr().err


def test_env_prints_versions(capsys):
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert "dualign" in out
    assert "devices" in out or "device 0" in out


def loaded_by(arguments, *, cwd):
    """Modules of a fresh interpreter after a command."""
    code = f"""
import json, sys
from pipeline.cli import main
try:
    main({arguments!r})
except SystemExit as ended:
    assert not ended.code, ended
print(json.dumps(sorted(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=cwd, timeout=120
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_help_imports_nothing_heavy(tmp_path):
    loaded = loaded_by(["--help"], cwd=tmp_path)
    assert not {"numpy", "pyarrow", "scipy", "matplotlib", "pydantic", "yaml", "rich", "torch", "pandas"} & loaded
    ours = {name for name in loaded if name.startswith(("pipeline.", "stage1_dual", "stage2_policy"))}
    assert {name for name in ours if not name.startswith("pipeline.commands")} == {
        "pipeline.cli",
        "pipeline.contracts",
        "pipeline.contracts.errors",
        "pipeline.contracts.privacy",
        "pipeline.logs",
        "pipeline.steps",
        "pipeline.steps.order",
    }


def test_a_table_is_solved_without_what_a_run_needs(tmp_path):
    table = scores_table(tmp_path / "s.parquet")
    asked = ["--reward", "helpful", "--constraint", "harmless >= 0", "--beta", "1", "--output", str(tmp_path / "out")]
    loaded = loaded_by(["solve", "--table", str(table), *asked, "--no-progress"], cwd=tmp_path)
    assert {"pipeline.dual.from_table", "matplotlib"} <= loaded
    run = {
        "torch",
        "transformers",
        "scipy.stats",
        "matplotlib.pyplot",
        "pipeline.config",
        "pipeline.microworld",
    }
    assert not (run | {"pipeline.run", "pipeline.scoring", "pipeline.steps.runner", "pipeline.baselines"}) & loaded


def test_the_answer_is_printed_before_the_figures_are_drawn(tmp_path, capsys, monkeypatch):
    """Drawing takes longer than solving; what fails after the answer still fails the command."""
    import pipeline.report.table_page

    def draw(*_, **__):
        assert "harmless" in capsys.readouterr().out
        raise InputError("the disk is full")

    monkeypatch.setattr(pipeline.report.table_page, "write_table_report", draw)
    assert solve_table(tmp_path, scores_table(tmp_path / "s.parquet"), "harmless >= 0") == 2
    assert "the disk is full" in capsys.readouterr().err
    assert not (tmp_path / "out" / "dual.json").exists()


def test_every_command_has_help_and_a_place(capsys):
    """`dualign X` is pipeline/steps/X.py, or a room of that name; sizes are planned where costs are."""
    from pipeline.steps.runner import STEPS

    assert list(STEPS) == list(SUMMARIES)
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    listed = capsys.readouterr().out
    commands = list(COMMANDS)
    assert set(commands) > {*SUMMARIES, *STAGES}
    package = Path(pipeline.__file__).parent
    for name in commands:
        assert re.search(rf"^    {name}\b", listed, flags=re.MULTILINE)
        if name not in STAGES:
            place = {"plan": "planning/sample_plan.py"}.get(name, f"steps/{name}.py")
            assert (package / place).is_file() or (package / name).is_dir(), name
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0
        shown = capsys.readouterr().out
        assert f"usage: dualign {name}" in shown
        assert f"\n  dualign {name}" in shown.split("examples:")[1]


def test_the_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"dualign {version('dualign')}\n"


@pytest.mark.parametrize("command", ["solve", "frontier"])
def test_an_unknown_option_of_a_table_command(tmp_path, capsys, command):
    asked = ["--table", "t", "--reward", "r", "--constraint", "g >= 0", "--beta", "1", "--output", str(tmp_path / "o")]
    assert main([command, *asked, "--sead", "3"]) == 2
    err = capsys.readouterr().err
    meant = "did you mean `--seed`" if command == "solve" else "did you mean `--seed` of `dualign solve --table`"
    assert f"has no option `--sead`; {meant}" in err


def scores_table(path, *, n_prompts=50, n_responses=30, change=None):
    rng = np.random.default_rng(0)
    n = n_prompts * n_responses
    helpful = rng.normal(size=n)
    columns = {
        "prompt_id": np.repeat(np.arange(n_prompts), n_responses),
        "helpful": helpful,
        "harmless": -0.5 * helpful + rng.normal(size=n),
        "toxicity": rng.uniform(size=n),
    }
    if change:
        change(columns)
    pq.write_table(pa.table(columns), path)
    return path


def solve_table(tmp_path, table, *constraints, command="solve", beta="1.0"):
    arguments = [
        command,
        "--table",
        str(table),
        "--reward",
        "helpful",
        "--beta",
        beta,
        "--output",
        str(tmp_path / "out"),
    ]
    for text in constraints:
        arguments += ["--constraint", text]
    return main(arguments)


def test_the_dual_of_any_table(tmp_path, capsys):
    table = scores_table(tmp_path / "s.parquet")
    assert solve_table(tmp_path, table, "harmless >= ref + 0.5", "toxicity <= 0.45") == 0
    dual = json.loads((tmp_path / "out" / "dual.json").read_text())
    assert dual["status"] == "certified"
    assert dual["kkt_residual"] <= 1e-8
    assert [entry["name"] for entry in dual["constraints"]] == ["harmless", "toxicity"]
    assert dual["constraints"][1]["predicted"] <= 0.45 + 1e-9
    assert "harmless" in capsys.readouterr().out
    assert pq.read_table(tmp_path / "out" / "frontier.parquet").num_rows == 2 * 62


def test_the_frontier_of_any_table(tmp_path, capsys):
    table = scores_table(tmp_path / "s.parquet")
    assert solve_table(tmp_path, table, "harmless >= ref + 0:1:0.1", "toxicity <= 0.48", command="frontier") == 0
    frontier = pq.read_table(tmp_path / "out" / "frontier.parquet").to_pandas()
    np.testing.assert_allclose(frontier["margin"], np.linspace(0, 1, 11), atol=1e-12)
    assert frontier["multiplier_harmless"].is_monotonic_increasing
    assert "11 thresholds, 11 of them feasible" in capsys.readouterr().out
    assert solve_table(tmp_path, table, "harmless >= 0", command="frontier") == 2
    assert solve_table(tmp_path, table, "harmless >= ref + 1:0:0.1", command="frontier") == 2


def test_an_infeasible_margin_exits_with_3_and_leaves_no_answer(tmp_path, capsys):
    table = scores_table(tmp_path / "s.parquet")
    assert solve_table(tmp_path, table, "harmless >= ref + 9") == 3
    err = capsys.readouterr().err
    assert "best attainable alone" in err
    assert "must shrink to less than" in err
    assert not (tmp_path / "out" / "dual.json").exists()


@pytest.mark.parametrize(
    ("change", "constraint", "message"),
    [
        (lambda c: None, "harmles >= 0", "no column 'harmles'; did you mean `harmless`?"),
        (lambda c: c["harmless"].__setitem__(7, np.nan), "harmless >= 0", "row 7: nan"),
        (lambda c: c["helpful"].__setitem__(3, np.inf), "harmless >= 0", "row 3: inf"),
        (lambda c: c.update(harmless=["x"] * 1500), "harmless >= 0", "must be a number"),
        (lambda c: c.update(prompt_id=[None] + [1] * 1499), "harmless >= 0", "1 empty values (first rows: [0])"),
        (lambda c: None, "harmless > 0", "is not of the form"),
    ],
)
def test_faults_of_a_table(tmp_path, capsys, change, constraint, message):
    table = scores_table(tmp_path / "s.parquet", change=change)
    assert solve_table(tmp_path, table, constraint) == 2
    assert message in capsys.readouterr().err


def test_beta_must_be_positive_and_the_table_must_be_there(tmp_path, capsys):
    table = scores_table(tmp_path / "s.parquet")
    assert solve_table(tmp_path, table, "harmless >= 0", beta="0") == 2
    assert "beta" in capsys.readouterr().err
    assert solve_table(tmp_path, tmp_path / "nowhere.parquet", "harmless >= 0") == 2
    assert "there is no such file" in capsys.readouterr().err
    (tmp_path / "broken.parquet").write_bytes(table.read_bytes()[:500])
    assert solve_table(tmp_path, tmp_path / "broken.parquet", "harmless >= 0") == 2
    assert "cannot be read: " in capsys.readouterr().err


def test_the_command_is_on_the_path_and_solving_a_table_imports_no_torch(tmp_path):
    table = scores_table(tmp_path / "s.parquet")
    code = (
        "import sys; from pipeline.cli import main; "
        f"status = main(['solve', '--table', {str(table)!r}, '--reward', 'helpful', '--constraint', 'harmless >= 0', "
        f"'--beta', '1', '--output', {str(tmp_path / 'out')!r}]); "
        "assert not {'torch', 'transformers', 'vllm', 'datasets'} & sys.modules.keys(); sys.exit(status)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, timeout=120)
    command = shutil.which("dualign", path=str(Path(sys.executable).parent))
    assert command is not None
    assert "--table" in subprocess.run([command, "solve", "--help"], check=True, capture_output=True, text=True).stdout


ROOT = Path(__file__).parents[2]


def test_a_reader_that_has_seen_enough_is_no_fault():
    plan = f"{sys.executable} -m pipeline run --dry-run | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", plan], capture_output=True, text=True, cwd=ROOT, check=False)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    assert done.stdout.splitlines()[-1] in {"0", "141"}


def test_a_full_output_is_reported(monkeypatch):
    with Path("/dev/full").open("w") as full:
        program = [sys.executable, "-m", "pipeline", "env"]
        done = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


def test_terminated_is_said_and_is_143(tmp_path):
    code = (
        "import os, signal, sys\n"
        "from pipeline.cli import main\n"
        "from pipeline.commands.all_commands import COMMANDS\n"
        "from pipeline.commands.subcommand import Subcommand\n"
        "perform = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
        "COMMANDS['env'] = Subcommand('x', lambda parser: None, perform)\n"
        "sys.exit(main(['env']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 143
    assert done.stderr == "dualign: terminated; finished work is kept, run the same command to continue\n"


@pytest.mark.parametrize(
    "name", ["../x", "/srv/x", ".", "..", "a/b", "a\nb", "-x", ".hidden", "x" * 101, "a\x1b[31m", "x.", "con "]
)
def test_the_name_of_a_run_is_one_plain_name(name, tmp_path, capsys):
    outside = tmp_path / "x" / "prompts" / "data"
    outside.mkdir(parents=True)
    (outside / "mine.parquet").write_text("mine")
    data = tmp_path / "project" / "data"
    assert main(["prepare", f"--run={name}", "--data-dir", str(data)]) == 2
    message = capsys.readouterr().err
    assert "the name of a run is at most 100 letters, digits" in message
    assert "\x1b" not in message
    assert not data.exists()
    assert (outside / "mine.parquet").read_text() == "mine"


def test_what_strangers_wrote_moves_no_terminal(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text('beta: 1\n"\\x1b[2Jx": 1\n')
    assert main(["run", "--dry-run", "--config", str(tmp_path / "r.yaml")]) == 2
    assert "\x1b" not in capsys.readouterr().err
