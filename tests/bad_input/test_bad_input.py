"""Every way we know of to get the input wrong: each is answered with an error that names the spot, and exit code 2.

A case is one row: what is wrong, the command, the files that it reads, and the spot that the first line of the answer
must name. The commands run in a folder with those files and with `good.csv`, `good.jsonl` and `run.jsonl` (a journal).
Bodies of HTTP requests have a table of their own, beside the front door's tests.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.command_line import rota, write_journal

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
AZURE_ROWS = AZURE + "2023-11-16 18:00:00.0000000,50,3\n2023-11-16 18:00:00.5000000,20,2\n"
MOONCAKE = '{"timestamp": 0, "input_length": 600, "output_length": 2, "hash_ids": [1, 2]}\n'
BURSTGPT = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
AGENTS = "kind,session,call,t_rel_s,gap_since_prev_call_s,input_tokens,output_tokens,common_prefix_tokens_with_prev\n"
ROTA = '{"format":"rota-trace","version":1}\n'
SYNTHETIC = """num_requests = 5
[arrivals]
rate = 5.0
[prompt]
quantiles = {"0" = 8, "1" = 16}
[output]
quantiles = {"0" = 1, "1" = 4}
"""
PROFILE = """model = "m"
accelerator = "a"
source = "nowhere"
[step_time]
name = "affine"
[limits]
num_blocks = 1000
"""
PLAY = "simulate --trace good.csv"
LOAD = "bench http://127.0.0.1:9 --rate 1"


class Case(NamedTuple):
    """One wrong input."""

    name: str
    command: str
    spot: str
    file: str = ""
    content: str | bytes = ""


def stack(name: str, content: str, spot: str) -> Case:
    return Case(f"stack: {name}", f"{PLAY} --stack s.toml", spot, "s.toml", content)


def trace(name: str, content: str | bytes, spot: str) -> Case:
    return Case(f"trace: {name}", "simulate --trace t", spot, "t", content)


def profile(name: str, content: str, spot: str) -> Case:
    return Case(f"profile: {name}", f"{PLAY} --profile p.toml", spot, "p.toml", content)


def journal(name: str, content: str, spot: str, command: str = "replay j") -> Case:
    """`{header}` and `{row}` in the content stand for the first two lines of a good journal."""
    return Case(f"journal: {name}", command, spot, "j", content)


FLAGS = [
    Case("no such verb", "simulat", "unknown verb 'simulat'"),
    Case("a flag before the verb", "--fast simulate", "unknown flag --fast"),
    Case("no such flag", f"{PLAY} --instnces 2", "unknown flag --instnces of rota simulate"),
    Case("a flag without its value", "simulate --trace", "--trace: needs a value"),
    Case("a missing flag", "simulate", "--trace: missing"),
    Case("a missing argument", "replay", "JOURNAL: missing"),
    Case("a missing second argument", "explain run.jsonl", "REQUEST: missing"),
    Case("an argument too many", "doctor now", "unexpected argument now"),
    Case("words for a number", f"{PLAY} --instances two", "integer, in 'two'"),
    Case("a fraction for a whole number", f"{PLAY} --seed 1.5", "integer, in '1.5'"),
    Case("no instances", f"{PLAY} --instances 0", "--instances: must be at least 1, not 0"),
    Case("fewer than no requests", f"{PLAY} --num-requests -3", "--num-requests: must be at least 1, not -3"),
    Case("a rate of nothing", f"{PLAY} --rate 0", "--rate: must be a number above 0, not 0"),
    Case("a rate that is no number", f"{PLAY} --rate nan", "--rate: must be a number above 0, not nan"),
    Case("an endless rate", f"{PLAY} --rate inf", "--rate: must be a number above 0, not inf"),
    Case("an engine that there is not", f"{PLAY} --engine sglang", "--engine: 'sglang' is not one of 'model', 'vllm'"),
    Case("a target without a value", f"{PLAY} --slo ttft", "--slo: 'ttft'"),
    Case("an unknown target", f"{PLAY} --slo tfft=5", "--slo: unknown target 'tfft'"),
    Case("a target below nothing", f"{PLAY} --slo ttft=-5", "--slo: ttft must be"),
    Case("a target given twice", f"{PLAY} --slo ttft=5,ttft=6", "--slo: ttft is given twice"),
    Case("a report that cannot be written", f"{PLAY} --report no/such/r.html", "--report: no/such/r.html"),
    Case("a journal that cannot be written", f"{PLAY} --journal no/such/j", "--journal: no/such/j"),
    Case("export to nowhere", "export run.jsonl", "--perfetto or --csv"),
    Case("a picture that cannot be written", "export run.jsonl --perfetto no/p.json", "--perfetto: no/p.json"),
    Case("a table that cannot be written", "export run.jsonl --csv .", "--csv: ."),
    Case("no such policy", "policies strict_priorty", "NAME: unknown policy 'strict_priorty'"),
    Case("no such request", "explain run.jsonl r-6000", "REQUEST: the journal has no request 'r-6000'"),
    Case("a port that there is not", "serve --engine simulated --port 70000", "--port: "),
    Case("a negative port", "serve --engine simulated --port -1", "--port: "),
    Case("two kinds of engine", "serve --engine simulated --engine vllm", "--engine: "),
    Case("a negative drain", "serve --engine simulated --drain -1", "--drain: must be a number that is not negative"),
    Case("serving with no instances", "serve --engine simulated --instances 0", "--instances: must be at least 1"),
    Case(
        "no time to start in", "serve --engine simulated --start-timeout 0", "--start-timeout: must be a number above 0"
    ),
    Case("an engine of no kind", "serve --engine sglang", "--engine: 'sglang'"),
    Case(
        "an unknown setting of vLLM", "serve --engine-option max_seqs=3", "--engine-option: unknown setting 'max_seqs'"
    ),
    Case("vLLM's own policy that it has not", "serve --stock sjf", "--stock: "),
    Case(
        "a batch policy that vLLM cannot host",
        "serve --stack s.toml",
        "batch policy 'prefill_first' needs admit_before_running",
        "s.toml",
        'batch = "prefill_first"\n',
    ),
    Case(
        "victims that vLLM cannot choose",
        "serve --stack s.toml",
        "RecomputeLast",
        "s.toml",
        'order = "strict_priority"\nmemory = "recompute_last"\n',
    ),
    Case("a setting of vLLM without a value", "serve --engine-option max_num_seqs", "--engine-option: "),
]

LOAD_FLAGS = [
    Case("a URL that is none", "bench nonsense --rate 1", "URL: 'nonsense'"),
    Case("a URL of another kind", "bench ftp://x --rate 1", "URL: 'ftp://x'"),
    Case("a URL with a broken port", "bench http://x:99999 --rate 1", "URL: 'http://x:99999'"),
    Case("neither a rate nor a trace", "bench http://127.0.0.1:9", "--rate or --trace"),
    Case("both a rate and a trace", f"{LOAD} --trace good.csv", "--rate: "),
    Case("faster than no trace", f"{LOAD} --speedup 2", "--speedup: needs --trace"),
    Case("slower than standing still", "bench http://x --trace good.csv --speedup 0", "--speedup: "),
    Case("no burstiness", f"{LOAD} --burstiness 0", "--burstiness: "),
    Case("no duration", f"{LOAD} --duration 0", "--duration: "),
    Case("a duration before the first request", f"{LOAD} --duration 1e-9", "--num-warmups: "),
    Case("no timeout", f"{LOAD} --timeout 0", "--timeout: "),
    Case("only warm-up", f"{LOAD} --num-requests 5 --num-warmups 5", "--num-warmups: 5 of 5"),
    Case("prompts of nothing", f"{LOAD} --prompt-tokens 0", "--prompt-tokens: '0'"),
    Case("prompts of words", f"{LOAD} --prompt-tokens many", "--prompt-tokens: 'many'"),
    Case("quantiles without an end", f"{LOAD} --prompt-tokens 0=5,0.5=9", "--prompt-tokens: quantiles"),
    Case("quantiles that fall", f"{LOAD} --max-tokens 0=9,1=5", "--max-tokens: quantiles"),
    Case("a quantile beyond all", f"{LOAD} --max-tokens 0=1,1=5,2=6", "--max-tokens: quantiles"),
    Case("quantiles for a trace", "bench http://x --trace good.csv --max-tokens 0=1,1=5", "--max-tokens: with --trace"),
    Case("a class without a name", f"{LOAD} --class share=1", "--class: no name"),
    Case("a class with an unknown fact", f"{LOAD} --class name=a,shre=1", "--class: unknown fact 'shre'"),
    Case("a class with half a fact", f"{LOAD} --class name=a,share=", "--class: share has no value"),
    Case("a class of no share", f"{LOAD} --class name=a,share=0", "--class: share"),
    Case("a class of half a priority", f"{LOAD} --class name=a,priority=0.5", "--class: priority"),
    Case("two classes of one name", f"{LOAD} --class name=a --class name=a", "--class: two classes"),
    Case("a tenant without a name", f"{LOAD} --tenant =2", "--tenant: tenant ''"),
    Case("a tenant with a line break", f"{LOAD} --tenant a\tb", "--tenant: tenant"),
    Case("no such tokenizer", f"{LOAD} --tokenizer no.json", "--tokenizer: "),
    Case("a bad row in a trace", "bench http://x --trace t", "t:2:", "t", AZURE + "x,1,1\n"),
]

FILES = [
    Case("no such trace", "simulate --trace nowhere.csv", "nowhere.csv: "),
    Case("a folder for a trace", "simulate --trace .", ".: cannot be read"),
    Case("no such stack", f"{PLAY} --stack nowhere.toml", "nowhere.toml: no such file"),
    Case("a folder for a stack", f"{PLAY} --stack .", ".: is a directory"),
    Case("no such journal", "replay nowhere", "nowhere: the journal cannot be read"),
    Case("no such journal to explain", "explain nowhere r-1", "nowhere: the journal cannot be read"),
    Case("no such profile", f"{PLAY} --profile llama-3.1-8b-a10", "unknown profile 'llama-3.1-8b-a10'"),
    Case("no such profile file", f"{PLAY} --profile nowhere.toml", "nowhere.toml: no such file"),
    stack("an unknown key", 'ordr = "fcfs"\n', "s.toml:1: ordr: unknown key"),
    stack("a wrong type", "order = 3\n", "s.toml:1: order: "),
    stack("no TOML", 'order = "fcfs\n', "s.toml:1:"),
    stack("an unknown policy", 'batch = "vllm"\n', "stack: batch"),
    stack(
        "an unknown parameter",
        'order = "strict_priority"\n[parameters.order]\nageing = 3\n',
        "unknown parameter 'ageing'",
    ),
    stack("a parameter of the wrong type", '[parameters.admission]\nmax_unfinished = "many"\n', "'max_unfinished'"),
    stack(
        "a parameter out of range", "[parameters.admission]\nmax_unfinished = 0\n", "max_unfinished must be at least 1"
    ),
    stack("a parameter for a policy without", "[parameters.order]\ntop = 1\n", "unknown parameter 'top'"),
    stack(
        "parameters for an unknown kind",
        "[parameters.ordering]\ntop = 1\n",
        "s.toml:1: parameters.ordering: unknown key",
    ),
    stack(
        "an endless number",
        "[parameters.admission]\nwindow_seconds = inf\n",
        "s.toml:2: parameters.admission.window_seconds",
    ),
    stack("a negative share", "[parameters.dispatch]\nmatch_min = -0.5\n", "match_min must be a share"),
    trace("nothing in it", "", "t:1:1: the file is empty"),
    trace("of no known format", "hello\nworld\n", "t:1:1: not a trace of a known format"),
    trace("not text", AZURE.encode() + b"\xff\xfe\n", "t:2:1: byte 0xff is not UTF-8"),
    trace("a column too few", AZURE + "2023-11-16 18:00:00,50\n", "t:2:23: GeneratedTokens: missing"),
    trace("a column too many", AZURE + "2023-11-16 18:00:00,50,3,4\n", "t:2:26: 4 columns"),
    trace("a count below 1", AZURE + "2023-11-16 18:00:00,0,3\n", "t:2:21: ContextTokens"),
    trace("a word for a count", AZURE + "2023-11-16 18:00:00,50,few\n", "t:2:24: GeneratedTokens"),
    trace("a day that there is not", AZURE + "2023-02-30 18:00:00,50,3\n", "t:2:1: TIMESTAMP"),
    trace("time that goes back", AZURE_ROWS + "2023-11-16 17:00:00,5,3\n", "t:4:1: TIMESTAMP"),
    trace("an empty line", AZURE_ROWS + "\n", "t:4:1: an empty line"),
    trace("JSON cut short", MOONCAKE + '{"timestamp": 5, "inp\n', "t:2:18: not JSON"),
    trace("a missing key", '{"timestamp": 0, "input_length": 5, "hash_ids": [1]}\n', "t:1:52: output_length: missing"),
    trace("an unknown key", MOONCAKE.replace("output_", "outpt_"), "t:1:39: 'outpt_length': unknown key"),
    trace("a text for a number", MOONCAKE.replace("600", '"600"'), "t:1:18: input_length"),
    trace("hashes that do not match", MOONCAKE.replace("[1, 2]", "[1]"), "t:1:59: hash_ids"),
    trace("a synthetic one without a rate", SYNTHETIC.replace("rate = 5.0", ""), "t:2: arrivals: "),
    trace("a synthetic one with a typo", SYNTHETIC.replace("rate", "rats"), "t:3: arrivals.rats: unknown key"),
    trace("a synthetic one at no rate", SYNTHETIC.replace("5.0", "0.0"), "t:2: arrivals: rate must be positive"),
    trace("a synthetic one without quantile 1", SYNTHETIC.replace('"1" = 16', '"0.5" = 16'), "t:4: prompt: quantiles"),
    trace("BurstGPT in milliseconds", BURSTGPT + "1700158546000,m,1,1,2,API log\n", "t:2:1: Timestamp: "),
    trace("BurstGPT with a total that is none", BURSTGPT + "1,m,1,1,3,API log\n", "t:2:9: Total tokens: 3 is not"),
    trace("a failed request of BurstGPT", BURSTGPT + "1,m,1,0,1,API log\n", "t:2:7: Response tokens: expected"),
    trace("an agent's call twice", AGENTS + "a,s,0,0,0,9,9,0\n" * 2, "t:3:5: call: 0 where call 1 should be"),
    trace("a turn of ShareGPT that is missing", "conv,turn,ctx,new,reply\n0,0,0,1,1\n0,2,2,1,1\n", "t:3:3: turn: 2"),
    trace("ShareGPT cut short", '[{"id": "a", "conversations": [', "t:1:32: the file is cut short"),
    trace(
        "a wait for nobody", ROTA + '{"at":0,"num_prompt_tokens":1,"num_output_tokens":1,"after":["a"]}\n', "t:2:53: "
    ),
    trace("a journal of an unfinished run", "{header}{row}", "t:3:1: no request arrives in this journal"),
    profile("an unknown key", PROFILE + "num_bloks = 3\n", "p.toml:8: limits.num_bloks: unknown key"),
    profile("a missing key", PROFILE.replace('model = "m"\n', ""), "p.toml: "),
    profile("no blocks", PROFILE.replace("1000", "0"), "p.toml:6: limits: num_blocks must be at least 1"),
    profile("a predictor that there is not", PROFILE.replace("affine", "afine"), "unknown step_time 'afine'"),
    profile(
        "a table that there is not",
        PROFILE.replace("affine", "grid") + "[step_time.parameters]\ntable = 'x.csv'\n",
        "x.csv",
    ),
    profile("an overhead below nothing", "step_overhead_ms = -1\n" + PROFILE, "p.toml: step_overhead_ms must be"),
    journal("nothing in it", "", "j:1: not the header"),
    journal("another file", AZURE_ROWS, "j:1: not the header"),
    journal("another version", '{"seed":1,"config_hash":"x","version":9}\n', "j:1: format"),
    journal(
        "a config that says nothing", '{"seed":1,"config_hash":"x","config":{"a":1}}\n', "j:1: the header's config"
    ),
    journal("a row that is none", "{header}what\n", "j:2: not a journal row"),
    journal("a row that is missing", "{header}{row}{row}", "j:3: row 0 where row 1"),
    journal(
        "an unknown machine",
        '{header}{"seq":0,"machine":"x","at":0,"kind":"deadline","event":null,"commands":[]}\n',
        "j:2: ",
    ),
    journal("a row cut short", "{header}{cut}", "j:2: the last line is cut short", "explain j r-1"),
    journal(
        "an end that lies",
        '{header}{row}{"end":"closed","num_rows":7,"digest":"x"}\n',
        "j:3: the end mark",
        "export j --csv c",
    ),
]

CASES = [*FLAGS, *LOAD_FLAGS, *FILES]


@pytest.fixture(scope="module")
def good_journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "run.jsonl"
    write_journal(path, faults=())
    return path


@pytest.fixture
def folder(tmp_path: Path, good_journal: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(good_journal, tmp_path / "run.jsonl")
    (tmp_path / "good.csv").write_text(AZURE_ROWS)
    (tmp_path / "good.jsonl").write_text(MOONCAKE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(case: Case, folder: Path, good_journal: Path) -> None:
    content = case.content
    if isinstance(content, str):
        header, row = good_journal.read_text().splitlines(keepends=True)[:2]
        for name, line in (("{header}", header), ("{row}", row), ("{cut}", row[:50])):
            content = content.replace(name, line)
        content = content.encode()
    if case.file:
        (folder / case.file).write_bytes(content)


def test_there_are_enough() -> None:
    assert len(CASES) >= 60
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_answered_with_its_spot(case: Case, folder: Path, good_journal: Path) -> None:
    write(case, folder, good_journal)
    ran = rota(*case.command.split(" "))
    first, *rest = ran.stderr.splitlines()
    assert (ran.code, ran.stdout) == (2, ""), ran.stderr
    assert first.startswith("error: ")
    assert case.spot in first
    assert not first.endswith(".")
    assert first.count(", in ") <= 1
    assert all(line.startswith("hint: ") for line in rest)
    assert "Traceback" not in ran.stderr and 'File "' not in ran.stderr


@pytest.mark.parametrize(
    "command",
    [PLAY, "replay run.jsonl", "simulate --trace good.jsonl"],
)
def test_the_good_files_are_good(command: str, folder: Path) -> None:
    assert rota(*command.split(" ")).code == 0


def test_a_process_of_its_own_says_the_same(folder: Path) -> None:
    command = [sys.executable, "-m", "rota.cli.main", "simulate", "--trace", "nowhere.csv"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: nowhere.csv: cannot be read: No such file or directory\n"
