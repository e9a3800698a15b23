"""Functions in the text of a module: which lines they are, and the text with others in their place.

`ast` finds the lines, and everything else stays as it was written, comments too. A method is named Class.method.
"""
import ast
import io


def function(source: str, name: str) -> ast.FunctionDef:
    """The function, or Class.method, of this name; raises StopIteration if there is none."""
    node = ast.parse(source)
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    if not isinstance(node, ast.FunctionDef):
        raise StopIteration
    return node


def lines_of(source: str) -> list[str]:
    """As `ast` counts them: str.splitlines would also end a line at a form feed."""
    return io.StringIO(source).readlines()


def whole_lines(source: str, name: str) -> slice:
    """Which lines of the source are the function, from its def to its end."""
    node = function(source, name)
    return slice(node.lineno - 1, node.end_lineno)


def body_lines(source: str, name: str) -> slice:
    """Which lines of the source are the function's body, behind its signature and its docstring."""
    node = function(source, name)
    before = node.body[0] if ast.get_docstring(node) is not None else node.returns or [*node.body, *node.args.args][-1]
    return slice(before.end_lineno, node.end_lineno)


def body_of(source: str, name: str) -> str:
    return "".join(lines_of(source)[body_lines(source, name)])


def with_lines(source: str, which: slice, text: str) -> str:
    """The source with this text in place of those lines."""
    lines = lines_of(source)
    lines[which] = [text]
    return "".join(lines)


def function_text(source: str, name: str) -> str:
    return "".join(lines_of(source)[whole_lines(source, name)])


def with_body(source: str, name: str, body: str) -> str:
    """The source with another body in the function."""
    return with_lines(source, body_lines(source, name), body)


def with_function(source: str, name: str, text: str) -> str:
    """The source with this text in place of the function, its signature too."""
    return with_lines(source, whole_lines(source, name), text)
