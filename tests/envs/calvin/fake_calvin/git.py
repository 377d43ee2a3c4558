"""A fake GitPython: the folder is a checkout unless NO_GIT is set."""

import os
from types import SimpleNamespace


class GitError(Exception):
    pass


exc = SimpleNamespace(GitError=GitError)


def Repo(folder):
    if os.environ.get("NO_GIT"):
        raise GitError(str(folder))
    return SimpleNamespace(head=SimpleNamespace(commit=SimpleNamespace(hexsha="0123456789abcdef")))
