"""What SECURITY.md promises: nothing of a data set is run, shown as markup or printed as a control sequence; no
credential gets into what is written; nobody listens."""

import ast
import dataclasses
import json
import logging
import pickle
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from report_helpers import failed, mixed_rows, write_table
from rich.table import Table
from rich.text import Text

from jobs import common
from jobs.cli import main
from pipeline.config import EvaluateConfig, FilesSource, LabelConfig, ModelConfig, PackConfig, ParquetSource, Section
from pipeline.config_train import TrainConfig
from pipeline.configfile import load_config, redacted
from pipeline.errors import ConfigError, MaskmillError, SchemaError, StorageError
from pipeline.models.load import load_model
from pipeline.printable import PlainFormatter, PrintableConsole, printable, printable_log
from pipeline.redaction import HIDDEN, is_secret_name, redact_options, redact_text, remember, unsigned
from pipeline.runfile import read_run
from pipeline.sources import parquet
from pipeline.sources.files import Files
from pipeline.sources.parquet import ParquetFiles
from pipeline.sources.templates import path_pattern
from pipeline.storage import open_fs, relative, storage_errors

REPOSITORY = Path(__file__).resolve().parent.parent
# Sequences that would clear the screen, write the clipboard, set the title, overwrite the line, turn text round.
HOSTILE = "a\x1b[2J\x1b]52;c;ZXZpbA==\x07\x9b31m\r\x08\u202egpj.exe\x00\x7f"
MARKUP = "[link=https://evil.invalid]x[/link] [/] :bomb:"
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


# The source of the package.

NAMES = {
    "eval", "exec", "compile", "__import__", "breakpoint",
    "os.system", "os.popen", "os.execv", "os.execvp", "os.spawnl", "tempfile.mktemp",
    "pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "dill.loads", "joblib.load", "marshal.loads",
    "shelve.open",
    "yaml.unsafe_load", "yaml.full_load", "torch.hub.load", "shutil.unpack_archive",
    "xml.etree.ElementTree.fromstring", "ElementTree.parse", "socketserver.TCPServer", "HTTPServer",
    "ThreadingHTTPServer",
    "asyncio.start_server", "socket.socket", "socket.create_server", "extractall", "ssl._create_unverified_context",
}  # fmt: skip
# LOADER: PyYAML's own safe one, in C where it is built (pipeline/infra.py).
SAFE_LOADERS = {"_SafeLoader", "yaml.SafeLoader", "yaml.CSafeLoader", "LOADER"}
# Between the processes of one run, through Ray, which pickles everything itself.
ALLOWED = {("pipeline/dataflow/board.py", "cloudpickle.loads")}


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a name or an attribute of one; `.c` of an attribute of anything else."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def loader(call: ast.Call) -> str:
    """What a call of yaml.load is given as its loader."""
    return next(
        (dotted(item.value) for item in call.keywords if item.arg == "Loader"),
        dotted(call.args[1]) if call.args[1:] else "",
    )


def complaints(source: str, where: str = "pipeline/report/x.py") -> list[str]:
    """Calls in `source` that run, unpickle, unpack or serve what they should not, as `line: call`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        name = dotted(node.func) if isinstance(node, ast.Call) else ""
        if not isinstance(node, ast.Call) or not name:
            continue
        last = name.rpartition(".")[2]
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        wrong = (
            name in NAMES
            or (last in NAMES and last not in {"compile", "exec", "eval"})
            or (last in ("load", "loads") and "pickle" in name and (where, name) not in ALLOWED)
            or (name == "torch.load" and given.get("weights_only") != "True")
            or (name == "np.load" and given.get("allow_pickle") != "False")
            or (name in ("yaml.load", "yaml.load_all") and loader(node) not in SAFE_LOADERS)
            or (last == "get_state_dict" and given.get("weights_only", "True") != "True")
            or given.get("shell", "False") != "False"
            or given.get("verify") == "False"
            or (last == "Environment" and "/report/" in f"/{where}" and given.get("autoescape") != "True")
            or (last == "Markup" and bool(node.args) and not isinstance(node.args[0], ast.Constant))
            or (last in ("bind", "listen") and "sock" in name)
        )
        if wrong:
            found.append(f"{where}:{node.lineno}: {name}")
    return found


def test_the_package_runs_unpickles_and_serves_nothing() -> None:
    files = sorted(path for folder in ("pipeline", "jobs") for path in (REPOSITORY / folder).rglob("*.py"))
    assert len(files) > 100
    found = [line for path in files for line in complaints(path.read_text("utf-8"), str(path.relative_to(REPOSITORY)))]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "eval(text)", "exec(text)", "os.system('x')", "subprocess.run(x, shell=True)", "pickle.loads(x)",
        "cloudpickle.loads(x)", "torch.load(p)", "torch.load(p, weights_only=False)", "np.load(p)",
        "yaml.load(t, Loader=L)",
        "yaml.load(t)", "yaml.unsafe_load(t)", "jinja2.Environment()", "Environment(autoescape=False)", "Markup(text)",
        "Markup(f'<b>{x}</b>')", "tar.extractall(p)", "shutil.unpack_archive(p)", "server_socket.bind(a)",
        "HTTPServer(a, b)", "requests.get(u, verify=False)", "tempfile.mktemp()",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(source: str) -> None:
    assert complaints(source)


def test_templates_mark_nothing_safe_but_the_pages_own() -> None:
    for path in (REPOSITORY / "pipeline" / "report" / "templates").glob("*.j2"):
        marked = re.findall(r"\{\{[^}]*\|\s*safe[^}]*\}\}", path.read_text("utf-8"))
        assert set(marked) <= {"{{ style | safe }}", "{{ script | safe }}"}, path
        assert "autoescape" not in path.read_text("utf-8")


# Listeners.


def test_jobs_without_ray_listen_on_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_table(tmp_path / "a", mixed_rows(1, 12))

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a job opens a port")

    monkeypatch.setattr(socket.socket, "listen", refuse)
    monkeypatch.setattr(socket.socket, "bind", refuse)
    before = listeners()
    lines = (
        ["status", table],
        ["report", table, "--bootstrap", "10"],
    )
    for line in lines:
        assert main(line) == 0, (line, capsys.readouterr())
        assert listeners() == before, line


def listeners() -> set[tuple[str, int]]:
    return {
        (connection.laddr.ip, connection.laddr.port)
        for connection in psutil.Process().net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }


# What is printed.


def test_printable_shows_what_it_takes_out() -> None:
    assert printable("naïve 日本語 \U0001f600 a–b") == "naïve 日本語 \U0001f600 a–b"
    assert printable("a\x1b[2J\u202eb\n\x9b") == r"a\x1b[2J\u202eb\n\x9b"
    assert printable(printable(HOSTILE)) == printable(HOSTILE)
    assert printable("a\nb", keep="\n") == "a\nb"
    printable("\ud800").encode()
    log = "\x1b[1;31mred\x1b[0m\tx\r\n"
    assert printable_log(log + HOSTILE) == log + printable(HOSTILE).replace("\\r", "\r")
    for text in (HOSTILE, "\x1b[31", "\x1b]0;title\x07", "\x1b[2K"):
        assert not re.search("\x1b(?!\\[[0-9;]*m)", printable_log(text))


def test_a_console_prints_no_sequence_of_a_text(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(HOSTILE)
    table.add_row(HOSTILE + MARKUP)
    table.add_row(Text(HOSTILE))
    table.caption = HOSTILE
    console = PrintableConsole(width=200)
    for thing in (table, HOSTILE, MARKUP, Text(MARKUP)):
        console.print(thing)
    shown = capsys.readouterr().out
    assert UNSAFE.search(shown) is None
    assert shown.count(MARKUP) == 3
    assert r"\x1b[2J" in shown


@pytest.fixture
def hostile_table(tmp_path: Path) -> str:
    """Failed rows whose ids and messages are what an attacker would name a file."""
    rows = [
        *mixed_rows(3, 6),
        {**failed("z/0", "UnreadableError", "read"), "image_id": HOSTILE + MARKUP, "error_message": HOSTILE},
        {**failed("z/1", "PredictTimeoutError", "predict"), "image_id": "</script><script>x", "error_message": MARKUP},
    ]
    return write_table(tmp_path / "hostile", rows)


def test_jobs_print_no_sequence_of_the_data(hostile_table: str, capsys: pytest.CaptureFixture[str]) -> None:
    for line in (["status"], ["status", "--json"], ["report", "--bootstrap", "0"], ["report", "--json"]):
        assert main([line[0], hostile_table, *line[1:]]) == 0
        shown = capsys.readouterr()
        assert UNSAFE.search(shown.out + shown.err) is None, line
        assert "script" in shown.out, line
    page = (Path(hostile_table) / "_report" / "index.html").read_text("utf-8")
    assert UNSAFE.search(page) is None
    assert printable(HOSTILE) in page
    assert page.count("<script>") == 1


def test_errors_and_logs_are_one_safe_line(capsys: pytest.CaptureFixture[str]) -> None:
    def body() -> int:
        raise ConfigError(f"no model {HOSTILE} at s3://name:PASSWORD@bucket/x")

    assert common.guarded(body) == 2
    assert main(["status", f"/nowhere/{HOSTILE.replace(chr(0), '')}"]) == 4
    shown = capsys.readouterr().err
    assert UNSAFE.search(shown) is None
    assert "PASSWORD" not in shown
    assert len(shown.splitlines()) == 2
    record = logging.LogRecord("x", logging.WARNING, "f", 1, "%s token=abcdef", (HOSTILE,), None)
    said = PlainFormatter("%(message)s").format(record)
    assert UNSAFE.search(said.replace("\r", "")) is None
    assert "abcdef" not in said


def test_an_unexpected_error_is_told_without_credentials(capsys: pytest.CaptureFixture[str]) -> None:
    def body() -> int:
        raise KeyError("https://host/a?X-Amz-Signature=SIGNED")

    assert common.guarded(body) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "KeyError" in shown
    assert "SIGNED" not in shown


# Credentials.

SECRETS = [
    ("s3://AKIAIOSFODNN7EXAMPLE:wJalr/XUtn+FEMI@bucket/a", "wJalr"),
    ("https://user:PASSWD@host:8080/x.tar", "PASSWD"),
    ("https://ghp_PERSONAL@host/x.tar", "PERSONAL"),
    ("https://h/a.tar?X-Amz-Credential=AKID&X-Amz-Signature=SIG1", "SIG1"),
    ("https://a.blob/c/x?sv=2024-01-01&sig=SIG2%3D&se=2027", "SIG2"),
    ("https://storage/x?X-Goog-Signature=SIG3", "SIG3"),
    ("https://api/x?id=1&api_key=APIKEY", "APIKEY"),
    ("DefaultEndpointsProtocol=https;AccountName=a;AccountKey=ACCT==;EndpointSuffix=b", "ACCT"),
    ("SharedAccessSignature=sv=1&sig=SIG4", "SIG4"),
    ("open({'key': 'KEY1', 'client_kwargs': {\"aws_secret_access_key\": 'SEC1'}})", "SEC1"),
    ('{"key": "KEY1", "token": "TOK1"}', "KEY1"),
    ("headers {'Authorization': 'Bearer TOK2TOK2'}", "TOK2"),
    ("GET / HTTP/1.1 Authorization: AWS4-HMAC-SHA256 Credential=TOK3", "TOK3"),
    ("sent Bearer TOK4TOK4TOK4", "TOK4"),
    ("storage.secret=SEC2 storage.password=SEC3", "SEC3"),
    ("the access key AKIAIOSFODNN7EXAMPLE is unknown", "AKIAIO"),
]


@pytest.mark.parametrize(("text", "secret"), SECRETS)
def test_credentials_are_taken_out_of_text(text: str, secret: str) -> None:
    said = redact_text(text)
    assert secret not in said
    assert HIDDEN in said
    assert redact_text(said) == said
    error = pickle.loads(pickle.dumps(StorageError(text)))
    assert secret not in str(error) + repr(error)


@pytest.mark.parametrize(
    "text",
    [
        "http://host:8265/folder@2x.png", "abfs://container@account.dfs/w", "s3://b/a:b@c", "s3://b/{000..127}.tar",
        "expected dotted.key=value, got 'x'", "source.limit=100 max_tokens=3", "status=ok; sort key is 'abc'",
        "expected storage.key=value", "memory://x?y=1", "keyboard=querty monkey=1", "{'name': 'a', 'tokens': 3}",
    ],
)  # fmt: skip
def test_other_text_stays(text: str) -> None:
    assert redact_text(text) == text


def test_what_a_process_was_given_is_hidden_by_its_value(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    remember({"client_kwargs": {"aws_secret_access_key": "v4lue-0f-opt1ons"}, "endpoint_url": "http://minio.host:9"})
    monkeypatch.setenv("AWS_SESSION_TOKEN", "v4lue-0f-env")
    said = redact_text("server at http://minio.host:9 says v4lue-0f-opt1ons, v4lue-0f-env")
    assert said == f"server at http://minio.host:9 says {HIDDEN}, {HIDDEN}"
    open_fs("memory://x", {"token": "t0ken-of-memory"})
    with pytest.raises(StorageError) as caught, storage_errors("memory://x"):
        raise OSError("refused: t0ken-of-memory")
    assert "t0ken-of-memory" not in str(caught.value)


def test_every_error_of_the_tree_redacts_and_pickles() -> None:
    kinds: list[type[MaskmillError]] = [MaskmillError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    assert len(kinds) > 15
    for kind in {kind for kind in kinds if kind.__module__.startswith("pipeline")}:
        error = pickle.loads(pickle.dumps(kind("at s3://name:PASSWORD@bucket")))
        assert type(error) is kind
        assert str(error) == f"at s3://name:{HIDDEN}@bucket"


def test_options_keep_addresses_alone() -> None:
    options = {
        "key": "K", "secret": "S", "anon": False, "endpoint_url": "https://u:PW@h", "account_key": "A",
        "connection_string": "C", "sas_token": "T", "headers": {"Authorization": "H"},
        "session_kwargs": {"auth": ["B"]},
        "client_kwargs": {"region_name": "eu", "aws_session_token": "W", "endpoint_url": ["https://h?sig=Q"]},
    }  # fmt: skip
    assert redact_options(options) == {
        **dict.fromkeys(["key", "secret", "account_key", "connection_string", "sas_token"], HIDDEN),
        "anon": False, "endpoint_url": f"https://u:{HIDDEN}@h", "headers": {"Authorization": HIDDEN},
        "session_kwargs": {"auth": HIDDEN},
        "client_kwargs": {"region_name": "eu", "aws_session_token": HIDDEN, "endpoint_url": [f"https://h?sig={HIDDEN}"]},
    }  # fmt: skip


def test_a_config_hides_credentials_wherever_they_stand() -> None:
    config = load_config(
        LabelConfig,
        None,
        [
            "source={format: webdataset, uri: 'https://h/{0..9}.tar?sig=SIG&n=1', storage: {secret: SEC}}",
            "models.0={name: unet_small, options: {hf_token: TOK, resize: 64}, weights: 'https://u:PW@h/w.pt'}",
            "output={uri: 's3://a:b/c@bucket/x', storage: {client_kwargs: {aws_secret_access_key: SEC}}}",
        ],
    )
    text = json.dumps(redacted(config))
    assert not [secret for secret in ("SIG", "SEC", "TOK", "PW", "b/c@") if secret in text]
    assert redacted(config)["models"][0]["options"]["resize"] == 64
    assert "n=1" in text


@pytest.mark.parametrize("kind", [LabelConfig, TrainConfig, EvaluateConfig, PackConfig])
def test_no_field_of_a_config_is_hidden_by_mistake(kind: type[Section]) -> None:
    def names(section: type[Section], seen: set[type]) -> Iterator[str]:
        seen.add(section)
        for name, field in section.model_fields.items():
            yield name
            for part in parts(field.annotation):
                if isinstance(part, type) and issubclass(part, Section) and part not in seen:
                    yield from names(part, seen)

    def parts(annotation: Any) -> Iterator[Any]:
        yield annotation
        for inner in getattr(annotation, "__args__", ()):
            yield from parts(inner)

    assert [name for name in names(kind, set()) if is_secret_name(name)] == []


def test_run_json_has_no_signature_of_a_weights_address() -> None:
    loaded = load_model(ModelConfig(name="null_model"), seed=0, tile_pixels=1 << 20)
    signed = dataclasses.replace(loaded, weights="https://h/w.safetensors?sv=1&sig=SIGNATURE")
    assert signed.describe()["weights"] == f"https://h/w.safetensors?sv=1&sig={HIDDEN}"


def test_ids_are_without_what_signs_an_address() -> None:
    signed = "shards/a.tar?X-Amz-Algorithm=A&X-Amz-Signature=S&X-Amz-Date=1&versionId=7"
    assert relative("", signed) == "shards/a.tar?versionId=7"
    assert unsigned("a.png?sv=1&sp=r&sig=S") == "a.png"
    assert unsigned("a.png?Expires=1&Signature=S&Key-Pair-Id=K") == "a.png"
    for other in ("a.png", "a.png?page=2&st=5", "what?.png", "a?b=c"):
        assert unsigned(other) == other


# What comes from elsewhere.


@pytest.mark.parametrize("uri", ["reference://x", "reference::https://h/r.json", "simplecache::REFERENCE://::s3://b/r"])
def test_files_of_templates_are_no_storage(uri: str) -> None:
    with pytest.raises(ConfigError, match="is not read"):
        open_fs(uri)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"models": ' * 50_000, "null", "[]", '{"models": [1]}', "\x00", ""])
def test_a_run_file_of_others_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(SchemaError, match=r"is no run\.json"):
        read_run(str(tmp_path), {})


def test_a_path_template_takes_no_longer_for_hostile_names(tmp_path: Path) -> None:
    """With a regular expression this name takes hours: 500 underscores, any four of which may be the right ones."""
    pattern = path_pattern("{a}_{b}_{c}_{d}_{e}x/{f}.png", "t")
    assert pattern is not None
    assert pattern.captures("a_" * 500 + "/z.png") is None
    assert pattern.captures("1_2_3_4_5_6x/z.png") == {"a": "1_2", "b": "3", "c": "4", "d": "5", "e": "6", "f": "z"}
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "a_1_2.png").write_bytes(b"x")
    source = Files(FilesSource(format="files", uri=str(tmp_path), images="{city}/{city}_{n}_{m}.png"))
    (sample, _) = source.read(next(iter(source.plan())), ())
    assert sample.fields == {"city": "a", "n": "1", "m": "2"}  # type: ignore[union-attr]


def test_a_dictionary_of_one_large_value_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 MB that compress to nothing, in each of 64 rows: a batch of 16 would be 64 MB."""
    value = bytes(4 << 20)
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 64, pa.int32()), pa.array([value], pa.binary()))
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": column}), path, compression="zstd", dictionary_pagesize_limit=1 << 30)
    assert path.stat().st_size < 20_000
    monkeypatch.setattr(parquet, "BATCH_BYTES", 10 << 20)
    sizes = []
    real = pq.ParquetFile.iter_batches

    def measured(self: pq.ParquetFile, *arguments: Any, **options: Any) -> Iterator[pa.RecordBatch]:
        for batch in real(self, *arguments, **options):
            sizes.append(batch.nbytes)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", measured)
    source = ParquetFiles(ParquetSource(format="parquet", uri=str(path)))
    (unit,) = source.plan()
    assert sum(len(getattr(item, "image", b"")) for item in source.read(unit, ())) == 64 * len(value)
    assert max(sizes) <= 10 << 20
