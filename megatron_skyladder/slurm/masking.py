"""What looks like a secret, and keeping it out of files: by names, and by how values begin.

Job scripts, settings and logs of a run are read by others. A secret is handed to a job by the
environment of ``sbatch``, as Slurm does with every variable, and written nowhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

MASK = "***"
MIN_MASKED = 8  # characters; shorter values would blot out ordinary words
_NAME = re.compile(
    r"api_?key|access_?key|private_?key|secret|token(?!iz)|passw|passphrase|credential|bearer"
    r"|(?:^|_)(?:key|pass|pat|pw|pwd|auth|dsn)(?:$|_)|pass$",
    re.IGNORECASE,
)
_FLAG = re.compile(
    r"""(--(?:\S*?(?:(?:api|access|secret|private|auth|wandb)[-_]?key|secret|passw(?:or)?d|passphrase
    |(?:hf|hub|auth|access|api|bearer|session|secret|login)[-_]token)|token))
    (?:=|\s+)["']?(?![$`]|--)[^\s"']""",
    re.IGNORECASE | re.VERBOSE,
)
# tokens of Hugging Face, GitHub, GitLab, OpenAI and its like, Slack, AWS; a JSON web token
_VALUE = re.compile(
    r"\b(?:hf_\w{16,}|gh[pousr]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|sk-[\w-]{16,}"
    r"|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"
    r"|://[^/\s:@$]*:[^/\s@$]+@|-----BEGIN [A-Z ]*PRIVATE KEY"
)
_WANDB_KEY = re.compile(r"[0-9a-f]{40}|local-[0-9a-f]{40}|wandb_v1_\w{16,}")
_ASSIGNMENT = re.compile(r"""(?:^|[\s;&,])(\w+)=(?!["']?[$`])["']?[^\s"';&]""")
_LOGIN = re.compile(
    r"\b(?:wandb\s+login|huggingface-cli\s+login|hf\s+auth\s+login)\s[^\n;&]*?\w{16,}"
)


def is_secret(name: str, value: str = "") -> bool:
    """Whether a variable looks like a secret, by its name or by its value.

    One too many does no harm: the job gets it in another way, and that is all.
    """
    return bool(_NAME.search(name) or _VALUE.search(value) or _WANDB_KEY.fullmatch(value))


def refuse(text: str, where: str) -> None:
    """Refuse shell lines or flags that spell out a secret.

    Args:
        text: what would be written into the job script and the settings.
        where: it stands, for the message.

    Raises:
        ValueError: there is one; the message names it, not its value.
    """
    found = next(_spelt_out(text), None)
    if found is not None:
        raise ValueError(
            f"{where} spells out what looks like a secret ({found}), and would be written into "
            "files that others read. Name the variable alone in [variables], and export it in the "
            "shell that submits."
        )


def mask(text: str, environment: Mapping[str, str]) -> str:
    """Return a text without the values of the environment's secrets."""
    secrets = [
        value
        for name, value in environment.items()
        if len(value) >= MIN_MASKED and is_secret(name, value)
    ]
    for value in sorted(secrets, key=len, reverse=True):
        text = text.replace(value, MASK)
    return _VALUE.sub(MASK, text)


def _spelt_out(text: str) -> Iterator[str]:
    """Yield what to call each secret of a text."""
    yield from (match[1] for match in _ASSIGNMENT.finditer(text) if _NAME.search(match[1]))
    yield from (match[1] for match in _FLAG.finditer(text))
    yield from ("a login with its key" for _ in _LOGIN.finditer(text))
    yield from (f"{match[0][:4]}..." for match in _VALUE.finditer(text))
