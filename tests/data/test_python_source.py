from __future__ import annotations

import ast

from fastdraft_hf.data import python_source


def test_files_are_the_library_and_no_tests() -> None:
    files = python_source.source_files()
    assert files == sorted(files)
    names = {f.name for f in files}
    assert {"textwrap.py", "json", "decoder.py"} & names == {"textwrap.py", "decoder.py"}
    assert not any({"test", "site-packages", "idle_test"} & set(f.parts) for f in files)


def test_heads_are_signature_and_docstring(heads: list[str]) -> None:
    assert len(heads) > 1000
    assert all(60 <= len(head) <= 900 for head in heads)
    dedent = next(h for h in heads if h.startswith("def dedent(text):"))
    assert dedent.rstrip().endswith('"""')
    assert "re.sub" not in dedent  # the body is left to the target
    parsed = 0
    for head in heads:
        try:
            tree = ast.parse(head)
        except SyntaxError:  # a docstring's own lines may stand left of the code
            continue
        parsed += 1
        (function,) = tree.body
        assert isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        assert len(function.body) == 1
        assert ast.get_docstring(function) is not None
    assert parsed > 0.95 * len(heads)
