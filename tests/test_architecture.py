"""The package's shape: imports go one way, nothing heavy is imported for --help, family names stay in the tables."""

import ast
import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "retmask_jax"

# A module imports only what stands above it.
ORDER = """
hosts shapes keys files records progress fingerprints memory hlo topology advice model.config model.rope hf_config
families model.adapters model.layers model.experts model.interventions model.kernels model.splash model.cudnn
model.attention model.cache model.transformer model.layerwise sharding flops checkpoint_files weights hub end_tokens
prefill generate stream lm variants sweep dpo sequence stats matching haystack head_scores detect detectors causal
knockout head_profile norm_utility head_statistics rotary data.tiny_language data.preferences data.chat data.prompts
data.released data.preference_dataset pairs endpoints training_settings optimizer objective reference train_step
checkpoints metrics train evals.measured evals.kept evals.scoring evals.generation_options evals.harness_model
evals.harness evals.helmet_worker evals.helmet_process evals.helmet_means evals.helmet evals.recall evals.perplexity
evals.words evals.questions evals.samples evals.ruler evals.niah evals.json_kv evals.rerank evals.suites page panels
figures wording evals.compare model_figures causal_figures causal_report eval_report report study_figures study_report
panel panel_figures panel_report pretrain assets inspection doctor recipes limits workdir finished context arms
causal_stages eval_stages detector_runs study_stages stages aot aot_decoding benchmarks.harness benchmarks.models
benchmarks.chip benchmarks.peers benchmarks.trl_peer benchmarks.programs benchmarks.by_hand benchmarks.peak
benchmarks.aot benchmarks.detect benchmarks.masks benchmarks.generate benchmarks.dpo benchmarks.memory pipeline main
""".split()


def _modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if path.stat().st_size and name != "__init__":
            yield name, path


def _imports(path):
    """(module of the package, whether at the top level) for each import in a file."""
    tree = ast.parse(path.read_text())
    known = {name for name, _ in _modules()}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("retmask_jax"):
            base = node.module.removeprefix("retmask_jax").removeprefix(".")
            whole = [f"{base}.{alias.name}".removeprefix(".") for alias in node.names]
            names = [name if name in known else base for name in whole]
        yield from (name for name in names if name)


def test_every_module_has_its_place_in_the_order():
    assert {name for name, _ in _modules()} == set(ORDER)


def test_imports_go_one_way():
    rank = {name: i for i, name in enumerate(ORDER)}
    wrong = [(name, used) for name, path in _modules() for used in _imports(path) if rank[used] >= rank[name]]
    assert not wrong


def test_no_module_has_the_name_of_a_public_function():
    import retmask_jax as rm

    assert not {name.split(".")[0] for name in ORDER} & set(rm.__all__)
    assert all(getattr(rm, name) is not None for name in rm.__all__)


def test_families_are_named_in_the_tables_only():
    family = re.compile(r"llama|qwen|gemma|olmo|mistral|phi", re.IGNORECASE)
    for name, path in _modules():
        if not name.startswith("model.") or name == "model.config":
            continue
        tree = ast.parse(path.read_text())
        words = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name)]
        words += [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        docs = {
            ast.get_docstring(n, clean=False) for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.Module))
        }
        # RoPE kinds carry the name their HF form has.
        assert not [w for w in words if family.search(w) and w not in docs and w not in ("llama3", "_llama3")], name


def test_files_stay_short():
    too_long = {name: n for name, path in _modules() if (n := len(path.read_text().splitlines())) > 430}
    assert not too_long


def test_help_needs_no_heavy_import():
    code = (
        "import sys; from retmask_jax.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'jax', 'flax', 'numpy', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "knockout" in done.stdout
