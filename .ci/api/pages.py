"""Writes a page for each public name. Stops at one without a docstring, or a method without paper or equation."""

import inspect
import re
import sys
import types
from pathlib import Path

from pdoc import doc, render

import flatlora

HERE, FOLDER = Path(__file__).parent, Path(sys.argv[1])
MODULES = [doc.Module.from_name(f"flatlora.{name}") for name in ("hf", "lightning", "reference")]
METHODS = re.findall(r"^\| `(\w+)` \|", (HERE.parent.parent / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
USED = {"add_param_group", "for_model", "load_state_dict", "metrics", "remove", "retrain", "state_dict", "step"}


def page(name: str) -> doc.Module:
    """A module of this name alone, which pdoc makes a page of."""
    text = inspect.getdoc(getattr(flatlora, name)) or ""
    if not text or (name in METHODS and not ("arXiv:" in text and re.search(r"\n\n {4}\S", text))):
        raise SystemExit(f"flatlora.{name}: the docstring is missing or, as a method's, lacks its paper or equation")
    module = types.ModuleType(f"flatlora.{name}")
    module.__dict__.update({"__all__": [name], name: getattr(flatlora, name)})
    return doc.Module(module)


def summary(one: doc.Module) -> str:
    text = (one.get(one.modulename.removeprefix("flatlora.")) or one).docstring.split("\n\n")[0].replace("\n", " ")
    return f"- [`{one.modulename}`]({one.modulename.replace('.', '/')}.html): {text}"


def tidy(cls: doc.Class) -> None:
    """Keeps what users call: members with docstrings of their own, and of those that others define too the `USED`."""
    bases = [vars(base) for base in cls.obj.__mro__[1:] if base.__module__.startswith("flatlora")]
    own = {name: name in USED if any(name in base for base in bases) else name in vars(cls.obj) for name in cls.members}
    kept = [name for name in own if own[name] and inspect.getattr_static(cls.obj, name).__doc__ and name[0] != "_"]
    cls.constructor, cls.inherited_members = cls.members["__init__"], {}
    cls.members = {name: cls.members[name] for name in kept}  # so that nothing links to the others
    cls.own_members = list(cls.members.values())
    for member in cls.own_members:  # of what `metrics()` returns each entry is an item of a list
        member.docstring = re.sub(r"^(?=``\w+``: )", "- ", member.docstring, flags=re.MULTILINE)


pages = [*map(page, flatlora.__all__), *MODULES]
index = doc.Module(types.ModuleType("flatlora", "\n".join([flatlora.__doc__, "", *map(summary, pages)])))
site = {one.modulename: one for one in (index, *pages)}
render.configure(docformat="google", template_directory=HERE)
(FOLDER / "flatlora").mkdir(parents=True, exist_ok=True)
for name, module in site.items():
    for cls in (member for member in module.flattened_own_members if isinstance(member, doc.Class)):
        tidy(cls)
    html = render.html_module(module, site)
    html = re.sub(r"arXiv:(\d+\.\d+)", r'<a href="https://arxiv.org/abs/\1">\g<0></a>', html)
    to = rf'<a href="{"flatlora/" if module is index else ""}\1.html">\g<0></a>'
    html = re.sub(rf"<code>({'|'.join(flatlora.__all__)})</code>", to, html)
    (FOLDER / f"{name.replace('.', '/')}.html").write_text(html, encoding="utf-8")
(FOLDER / "index.html").write_text(render.html_index(site), encoding="utf-8")
(FOLDER / "search.js").write_text(render.search_index(site), encoding="utf-8")
