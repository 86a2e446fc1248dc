"""Constructor parameters of classes, read from their source by `ast` without importing it.

Importing a stage takes ten seconds, because torch and lightning come with it; parsing its source takes milliseconds. The
alternative, a generated data file, would be one more file that can be out of date.
"""

from __future__ import annotations

import ast
import importlib.util
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import docstring_parser

REQUIRED = object()
"""The default of a parameter that has none."""
SCALARS = ("bool", "int", "float", "str")
_CONTAINERS = ("tuple", "Tuple", "list", "List", "Sequence", "Iterable", "Set", "set", "frozenset")


@dataclass(frozen=True)
class ClassSource:
    """A class and the module whose source defines it."""

    module: str
    name: str
    node: ast.ClassDef = field(compare=False, repr=False)

    @property
    def path(self) -> str:
        """The `class_path`."""
        return f"{self.module}.{self.name}"

    @property
    def is_dataclass(self) -> bool:
        """Whether the class is decorated as a dataclass."""
        return any("dataclass" in ast.unparse(decorator) for decorator in self.node.decorator_list)


@dataclass(frozen=True)
class Kind:
    """The values that an annotation allows.

    Attributes:
        choices: values of `Literal`.
        items: values of `Literal` that the items of a sequence may have.
        scalars: of `bool`, `int`, `float` and `str`.
        optional: None is allowed.
        dataclasses: settings with fields.
        classes: classes of which the value is an instance, chosen by `class_path`.
        others: anything that is not checked here, such as lists and mappings.
        text: the annotation for people.
    """

    choices: tuple[Any, ...] = ()
    items: tuple[Any, ...] = ()
    scalars: frozenset[str] = frozenset()
    optional: bool = False
    dataclasses: tuple[ClassSource, ...] = ()
    classes: tuple[ClassSource, ...] = ()
    others: bool = False
    text: str = ""

    def __or__(self, other: Kind) -> Kind:
        return Kind(
            (*self.choices, *(value for value in other.choices if str(value) not in map(str, self.choices))),
            self.items + other.items,
            self.scalars | other.scalars,
            self.optional or other.optional,
            self.dataclasses + other.dataclasses,
            self.classes + other.classes,
            self.others or other.others,
        )


@dataclass(frozen=True)
class Parameter:
    """One parameter of a constructor, or one field of a dataclass.

    Attributes:
        name: the name.
        kind: what it may be.
        default: the default value, or `REQUIRED`; the source text where it is no constant.
        doc: the first sentence of its description.
    """

    name: str
    kind: Kind
    default: Any
    doc: str


@dataclass(frozen=True)
class Signature:
    """The parameters of a class. `complete`: it takes no others."""

    parameters: Mapping[str, Parameter]
    complete: bool


def find_class(path: str) -> ClassSource | None:
    """Return the class of a dotted path, or None if its source is not found."""
    module, _, name = path.rpartition(".")
    found = _resolve(module, name) if module else None
    return found[1] if found is not None and isinstance(found[1], ClassSource) else None


@cache
def signature(source: ClassSource) -> Signature:
    """Return the parameters of a class, those of its bases where it has no constructor."""
    docs = _docs(source)
    if source.is_dataclass:
        fields = [(source.module, item) for item in source.node.body if isinstance(item, ast.AnnAssign)]
        found = {
            ast.unparse(item.target): _parameter(module, ast.unparse(item.target), item.annotation, item.value, docs)
            for module, item in fields
            if "ClassVar" not in ast.unparse(item.annotation)
        }
        return Signature(found, complete=not source.node.bases)
    constructor = _method(source, "__init__")
    if constructor is None:
        base = next(iter(_bases(source)), None)
        return signature(base) if base is not None else Signature({}, complete=False)
    arguments = constructor.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults)) + [*arguments.defaults]
    pairs = [*zip(positional, defaults, strict=True), *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    found = {
        argument.arg: _parameter(source.module, argument.arg, argument.annotation, default, docs)
        for argument, default in pairs
        if argument.arg != "self"
    }
    return Signature(found, complete=arguments.kwarg is None)


def _parameter(
    module: str, name: str, annotation: ast.expr | None, default: ast.expr | None, docs: Mapping[str, str]
) -> Parameter:
    kind = Kind(others=True, text="any") if annotation is None else _kind(module, annotation)
    value = REQUIRED if default is None else _constant(module, default)
    return Parameter(name, kind, value, docs.get(name, ""))


def _kind(module: str, node: ast.expr) -> Kind:
    return replace(_alternatives(module, node), text=ast.unparse(node).replace("'", ""))


def _alternatives(module: str, node: ast.expr) -> Kind:
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            return _alternatives(module, ast.parse(node.value, mode="eval").body)
        return Kind(optional=True) if node.value is None else Kind(others=True)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _alternatives(module, node.left) | _alternatives(module, node.right)
    if isinstance(node, ast.Subscript):
        return _subscript(module, node)
    if isinstance(node, ast.Name):
        if node.id in SCALARS:
            return Kind(scalars=frozenset({node.id}))
        return _named(module, node.id)
    return Kind(others=True)


def _subscript(module: str, node: ast.Subscript) -> Kind:
    name = ast.unparse(node.value).rpartition(".")[2]
    inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if name == "Literal":
        return Kind(choices=tuple(ast.literal_eval(item) for item in inner))
    if name in ("Optional", "Union"):
        kind = Kind(optional=name == "Optional")
        for item in inner:
            kind |= _alternatives(module, item)
        return kind
    if name in _CONTAINERS:
        return Kind(items=_alternatives(module, inner[0]).choices, others=True)
    return Kind(others=True)


def _named(module: str, name: str) -> Kind:
    found = _resolve(module, name)
    if found is None:
        return Kind(others=True)
    home, value = found
    if isinstance(value, ClassSource):
        if value.is_dataclass:
            return Kind(dataclasses=(value,))
        return Kind(classes=(value,))
    return _alternatives(home, value)


def _constant(module: str, node: ast.expr) -> Any:
    """Return the value of a default; a dict of the arguments given for a dataclass; else the source text."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        pass
    if isinstance(node, ast.Name):
        found = _resolve(module, node.id)
        if found is not None and not isinstance(found[1], ClassSource):
            return _constant(found[0], found[1])
        return node.id
    if isinstance(node, ast.Call):
        keywords = {item.arg: item.value for item in node.keywords if item.arg}
        if ast.unparse(node.func).rpartition(".")[2] == "field":
            if "default" in keywords:
                return _constant(module, keywords["default"])
            factory = keywords.get("default_factory")
            empty: dict[str, Any] = {"tuple": (), "list": [], "dict": {}}
            return empty.get(ast.unparse(factory), {}) if factory is not None else REQUIRED
        return {name: _constant(module, value) for name, value in keywords.items()}
    return ast.unparse(node)


@cache
def _resolve(module: str, name: str) -> tuple[str, ClassSource | ast.expr] | None:
    """Return where a name of a module is defined, following imports, and its class or assigned expression."""
    tree = _tree(module)
    if tree is None:
        return None
    for node in _statements(tree):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, ClassSource(module, name, node)
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name and node.value is not None:
            return module, node.value
        if isinstance(node, ast.Assign) and any(ast.unparse(target) == name for target in node.targets):
            return module, node.value
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _resolve(node.module, alias.name)
    return None


def _statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """Yield the statements of a module, those of `if TYPE_CHECKING` and `try` included."""
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        node = waiting.pop(0)
        yield node
        if isinstance(node, ast.If | ast.Try):
            waiting = [*node.body, *node.orelse, *waiting]


@cache
def _tree(module: str) -> ast.Module | None:
    """Return the parsed source of a module, found beside its top-level package, which is not imported."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        base = Path(place, *rest)
        for path in (base / "__init__.py", base.with_name(base.name + ".py")):
            if path.is_file():
                return ast.parse(path.read_text(encoding="utf-8"))
    return None


def _method(source: ClassSource, name: str) -> ast.FunctionDef | None:
    return next((item for item in source.node.body if isinstance(item, ast.FunctionDef) and item.name == name), None)


def _bases(source: ClassSource) -> list[ClassSource]:
    found = [_resolve(source.module, ast.unparse(base)) for base in source.node.bases]
    return [item[1] for item in found if item is not None and isinstance(item[1], ClassSource)]


@cache
def _docs(source: ClassSource) -> Mapping[str, str]:
    """Return the first sentence on each parameter; "see `Base`" is replaced by what the base class says."""
    texts = [ast.get_docstring(source.node) or ""]
    constructor = _method(source, "__init__")
    if constructor is not None:
        texts.append(ast.get_docstring(constructor) or "")
    docs: dict[str, str] = {}
    for text in texts:
        head, _, rest = text.partition("\n")
        if head == "Attributes:":  # no summary line, so that `get_docstring` removed the indentation of the entries
            text = f"Settings.\n\n{head}\n{textwrap.indent(rest, '    ')}"
        for item in docstring_parser.parse(text, docstring_parser.DocstringStyle.GOOGLE).params:
            docs[item.arg_name] = first_sentence(item.description or "")
    referred = {name for name, doc in docs.items() if doc.lower().startswith("see `") and doc.count(" ") == 1}
    for base in _bases(source):
        for name in referred & set(_docs(base)):
            docs[name] = _docs(base)[name]
    return docs


def first_sentence(text: str) -> str:
    """Return the first sentence of a text, on one line, with a full stop."""
    line = " ".join(text.replace("``", "`").split())
    for place in range(len(line) - 1):
        head = line[:place]
        if line.startswith(". ", place) and head.count("(") == head.count(")") and not head.endswith((" al", "e.g")):
            line = head
            break
    line = line.rstrip(".")
    return f"{line[0].upper()}{line[1:]}." if line else ""
