"""How the project is built: who imports whom, how long files may be, and the style ruff lacks.

Everything is read from the sources by `ast`; the last test shows that each check can fail.
"""

import ast
import graphlib
import importlib
import itertools
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
ROOMS = ("cli", "formats", "kernels", "text")
PAPER = ("qalora", "quant", "llama", "merge", "train")
PUBLIC = {  # what tests, benchmarks and other people's code import, and from where
    "llama": "LlamaConfig CONFIGS Llama generate load_pretrained",
    "quant": "quantize_rtn quantize_gptq Quantized dequantize pack unpack quant_matmul QuantLinear "
    "quantize_model load_quantized save_quantized",
    "qalora": "QALoRALinear add_adapters adapter_parameters LoRALinear",
    "merge": "merge",
    "formats": "load_model",
}
DOORS = {  # imports inside a function: a room behind imports the module that opens the door
    ("llama", "formats"),
    ("quant", "formats.quantized"),
    ("merge", "formats.peft"),
    ("merge", "formats.run"),
    ("kernels.matmul", "kernels.triton_kernels"),  # optional: needs Triton
}
COMMANDS = {"train", "sample", "evals", "export", "compare", "bench"}


def parsed(paths):
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


FOLDERS = [ROOT, *(ROOT / room for room in ROOMS)]
SOURCES = {}
for folder in FOLDERS:
    SOURCES |= parsed(folder.glob("*.py"))
MODULES = {module_name(path): tree for path, tree in SOURCES.items()}
TESTS = parsed((ROOT / "tests").glob("*.py"))
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


# ---- who imports whom


def named_in(statement, modules):
    """The project modules that an import statement names."""
    if isinstance(statement, ast.Import):
        names = [alias.name for alias in statement.names]
    else:
        package = statement.module
        names = [f"{package}.{alias.name}" for alias in statement.names]
        names = [name if name in modules else package for name in names]
    return {name for name in names if name in modules}


def imports(tree, inside_functions, modules=MODULES):
    """The project modules that are imported when a module is, or else when a function is called."""
    found = set()

    def visit(node, inside):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom) and inside == inside_functions:
                found.update(named_in(child, modules))
            visit(child, inside or isinstance(child, FUNCTIONS))

    visit(tree, False)
    return found


def cycle(modules):
    """The modules of a cycle of imports at module level, or None."""
    graph = {name: imports(tree, False, modules) for name, tree in modules.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as e:
        return e.args[1]
    return None


def reachable(start):
    """All project modules that importing one imports."""
    seen, waiting = set(), [start]
    while waiting:
        more = imports(MODULES[waiting.pop()], False) - seen
        seen |= more
        waiting += more
    return seen


def test_imports_have_no_cycle():
    assert cycle(MODULES) is None


def test_the_model_knows_nothing_of_quantization_and_the_quantizer_nothing_of_files():
    assert not reachable("llama"), "llama.py stands alone"
    formats = {name for name in MODULES if name.partition(".")[0] == "formats"}
    assert not reachable("quant") & formats
    assert not reachable("qalora") & formats
    assert not reachable("merge") & formats
    assert not reachable("quant") & {"qalora", "baselines", "merge", *COMMANDS}


def test_imports_inside_functions_are_the_documented_doors():
    found = set()
    for name, tree in MODULES.items():
        found |= {(name, imported) for imported in imports(tree, True)}
    assert found == DOORS


def test_formats_and_kernels_know_no_training_and_no_command():
    allowed = {"cli.errors", "cli.files", "cli.machine"}
    behind = {name for name in MODULES if name.startswith("cli.")} - allowed
    for name in MODULES:
        if name.partition(".")[0] in ("formats", "kernels", "text"):
            assert not reachable(name) & (behind | COMMANDS), name


def test_public_names_are_where_they_are_promised():
    for module, names in PUBLIC.items():
        for name in names.split():
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


# ---- lengths


def lines(path):
    return len(path.read_text(encoding="utf-8").splitlines())


def test_the_paper_is_five_short_files():
    assert sum(lines(ROOT / f"{name}.py") for name in PAPER) <= 1300


def test_no_test_file_is_long():
    long = {path.name: lines(path) for path in TESTS if lines(path) > 500}
    assert not long


def test_the_specification_is_short():
    assert lines(ROOT / "tests" / "test_specification.py") <= 300


def test_the_readme_is_short():
    assert lines(ROOT / "README.md") <= 150


# ---- style


def style_violations(tree):
    """[(line, what)] of what is hard to read and ruff does not find."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, COMPREHENSIONS) and len(node.generators) > 1:
            found.append((node.lineno, "a comprehension with two `for`s"))
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Lambda):
            found.append((node.lineno, "a lambda with a name"))
        if isinstance(node, ast.Lambda):
            body = node.body.value if isinstance(node.body, ast.Subscript) else node.body
            parts = body.elts if isinstance(body, ast.Tuple) else []
            if any(isinstance(part, ast.Call) for part in parts[:-1]):
                found.append((node.lineno, "a lambda of several statements"))
        if isinstance(node, ast.IfExp):
            inner = [n for n in ast.walk(node) if isinstance(n, ast.IfExp)]
            if len(inner) > 1:
                found.append((node.lineno, "a conditional expression inside another"))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Tuple):
            found.append((node.lineno, "a tuple of expressions as a statement"))
        for body in bodies(node):
            for first, second in itertools.pairwise(body):
                if first.end_lineno == second.lineno:
                    found.append((second.lineno, "two statements on a line"))
            if isinstance(node, ast.stmt) and body and body[0].lineno == node.lineno:
                found.append((node.lineno, "a block on the line of its head"))
    return found


def bodies(node):
    """The lists of statements in a node."""
    fields = ("body", "orelse", "finalbody")
    return [getattr(node, f) for f in fields if isinstance(getattr(node, f, None), list)]


def missing_hints(tree):
    """["function(parameter)"] of public functions and methods; return types are ruff's ANN201."""
    found = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            if any(ast.unparse(base).endswith("autograd.Function") for base in node.bases):
                continue  # torch prescribes its methods
            for method in node.body:
                found += [f"{node.name}.{text}" for text in unhinted(method)]
        found += unhinted(node)
    return found


def unhinted(node):
    if not isinstance(node, ast.FunctionDef):
        return []
    if node.name.startswith("_") and node.name != "__init__":
        return []
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
    return [f"{node.name}({name})" for name in bare]


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=lambda p: str(p.relative_to(ROOT)))
def test_every_line_is_plain(path):
    found = style_violations(SOURCES.get(path) or TESTS[path])
    assert not found, "\n".join(f"{path.name}:{line}: {what}" for line, what in found)


@pytest.mark.parametrize("path", list(SOURCES), ids=lambda p: str(p.relative_to(ROOT)))
def test_public_functions_have_type_hints(path):
    assert not missing_hints(SOURCES[path])


@pytest.mark.parametrize(
    "text",
    [
        "a = [x for y in z for x in y]",
        "f = lambda x: x",
        "f: int = lambda x: x",
        "a(lambda x: (f(x), g(x))[1])",
        "a(lambda x: (f(x), g(x)))",
        "a = 1 if b else 2 if c else 3",
        "a = (1 if b else 2) if c else 3",
        "f(), g()",
        "a = 1; b = 2",
        "if a: b()",
        "def f(): pass",
    ],
)
def test_each_style_check_can_fail(text):
    assert len(style_violations(ast.parse(text))) >= 1


def test_the_other_checks_can_fail():
    chain = {"a": "import b", "b": "from c import x", "c": "if x:\n    from d import e", "d.e": ""}
    chain = {name: ast.parse(text) for name, text in chain.items()}
    assert cycle(chain) is None
    assert cycle(chain | {"d.e": ast.parse("import a")}) is not None
    assert cycle(chain | {"d.e": ast.parse("def f():\n    import a")}) is None
    door = ast.parse("def f():\n    import quant")
    assert imports(door, True) == {"quant"} and not imports(door, False)
    assert missing_hints(ast.parse("def f(a, b: int, *, c): pass")) == ["f(a)", "f(c)"]
    assert missing_hints(ast.parse("class C:\n    def f(self, a): pass")) == ["C.f(a)"]
    assert not missing_hints(ast.parse("def _f(a): pass"))
