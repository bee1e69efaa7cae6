"""Syntax trees of programs that others wrote."""

import ast
import warnings


def syntax_tree(text: str) -> ast.Module:
    """The syntax tree of a program, without the compiler's warnings about it. Raises ValueError if it has none.

    The ValueError's cause is the SyntaxError, with the line in which the program breaks, where there was one.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(text)
        except (SyntaxError, RecursionError, MemoryError) as error:
            raise ValueError(str(error)) from error


def is_python(text: str) -> bool:
    try:
        syntax_tree(text)
    except ValueError:
        return False
    return True
