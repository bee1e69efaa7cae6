"""Programs that judges of contests run: `class Solution`, and the imports that those judges put before a program."""

import re
from typing import Any

from fractal.problems.syntax import syntax_tree

# What LeetCode, APPS, TACO and LiveCodeBench have before each program (testing_util.py there), named one by one.
IMPORTS = """\
import bisect, collections, copy, functools, heapq, itertools, math, operator, random, re, string, sys
from bisect import bisect_left, bisect_right, insort
from collections import Counter, OrderedDict, defaultdict, deque
from functools import cache, cmp_to_key, lru_cache, reduce
from heapq import heapify, heappop, heappush, heappushpop, heapreplace, nlargest, nsmallest
from itertools import accumulate, chain, combinations, count, groupby, pairwise, permutations, product, zip_longest
from math import ceil, comb, factorial, floor, gcd, inf, isqrt, lcm, log, log2, log10, pi, sqrt
from operator import add, and_, itemgetter, mul, or_, sub, xor
from string import ascii_letters, ascii_lowercase, ascii_uppercase
from typing import Any, Dict, Iterable, Iterator, List, Optional, Set, Tuple, Union
"""

# A result and what is expected of it as APPS's testing_util.py compares them: a tuple counts as a list, and where a
# list is expected, its first item counts, too.
AS_LISTS = (
    "(list(result) if isinstance(result, tuple) else [list(x) if isinstance(x, tuple) else x for x in result] "
    "if isinstance(result, list) else result)"
)
AS_APPS = f"{AS_LISTS} == expected or (isinstance(expected, list) and len(expected) > 0 and {AS_LISTS} == expected[0])"
EQUAL_AS_LISTS = f"{AS_LISTS} == expected"


def target(name: str, *programs: str) -> str:
    """How a judge calls a function: as a method of `class Solution` where a program has that class."""
    return f"Solution().{name}" if any(re.search(r"^class Solution\b", p, re.MULTILINE) for p in programs) else name


def first_python(programs: list[Any]) -> str:
    """The first program that is Python 3, "" if none is: such sets have Python 2 and other languages, too."""
    for program in programs:
        if isinstance(program, str) and program.strip():
            try:
                syntax_tree(program)
            except ValueError:
                continue
            return program.rstrip() + "\n"
    return ""
