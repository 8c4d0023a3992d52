"""The versions of libraries on which results depend, checked before they are used.

The bounds stand here, not only in the package's metadata: a checkout runs without being installed, and the metadata
of an editable one can be older than its code.
"""

from __future__ import annotations

import functools
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from hdscale.errors import UserError

BOUNDS = {
    # oldest release whose stable interface the compiled operator uses
    "torch": ">=2.11",
    # before 0.19.8 some modes keep only the last micro-batch's gradients, or copy them too late, without an error
    "deepspeed": ">=0.19.8,<0.20",
    # a release is allowed once the tests have passed with it: caches are passed under names that change
    "transformers": ">=5.20,<5.25",
}
"""{library: versions that hdscale works with}; pyproject.toml says the same."""


class WrongVersionError(ImportError, UserError):
    """A library is installed in a version with which results would be wrong. Commands print it and exit with 2."""


@functools.cache
def require(*libraries: str) -> None:
    """Check installed versions by their metadata; nothing is imported. A library that is missing passes.

    Raises:
        WrongVersionError: naming the installed version, what is needed, and the command that installs it.
    """
    wrong = []
    for library in libraries:
        try:
            installed = version(library)
        except PackageNotFoundError:
            continue
        # a vendor's 2.11.0a0+x counts as 2.11.0, a 5.25.0.dev0 as 5.25.0
        if not SpecifierSet(BOUNDS[library]).contains(Version(installed).base_version):
            wrong.append((library, installed))
    if wrong:
        found = ", ".join(f"{library} {installed}" for library, installed in wrong)
        needed = [f"{library}{BOUNDS[library]}" for library, _ in wrong]
        quoted = " ".join(f"'{one}'" for one in needed)
        raise WrongVersionError(
            f"{found} {'is' if len(wrong) == 1 else 'are'} installed, hdscale needs {' and '.join(needed)}: "
            f"pip install {quoted}"
        )
