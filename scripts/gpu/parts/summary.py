"""summary.md: what was found, for people."""

LISTED_CHECKS = 40  # of a part; failed ones are always listed


def markdown(record):
    lines = ["# GPU check", "", f"Device `{record['device']}`{', quick' if record['quick'] else ''}, {record['elapsed_s']} s.", ""]
    overview = [
        {"part": part["part"], "status": part["status"], "checks": counted(part.get("checks", [])),
         "seconds": part["elapsed_s"], "reason": part.get("reason", "")}
        for part in record["parts"]
    ]
    lines += table(overview)
    for part in record["parts"]:
        lines += section(part)
    return "\n".join(lines) + "\n"


def section(part):
    lines = ["", f"## {part['part']}: {part['status']}", ""]
    lines += [f"- {name}: {value}" for name, value in part.get("facts", {}).items()]
    if rows := part.get("rows"):
        lines += ["", *table(rows)]
    checks = part.get("checks", [])
    failed = [check for check in checks if not check["passed"]]
    listed = checks if len(checks) <= LISTED_CHECKS else failed
    if listed:
        lines += ["", *table([{"check": c["case"], "": "pass" if c["passed"] else "**FAIL**", "detail": c["detail"]} for c in listed])]
    return lines


def counted(checks):
    passed = sum(check["passed"] for check in checks)
    return f"{passed} of {len(checks)}" if checks else ""


def table(rows):
    """A Markdown table of dicts, columns in the order of their first use; lists and dicts are left out."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    names = [name for name in names if not any(isinstance(row.get(name), (list, dict)) for row in rows)]
    cell = lambda value: str(value).replace("|", "\\|").replace("\n", " ")
    line = lambda cells: f"| {' | '.join(cells)} |"
    return [line(names), line(["---"] * len(names)), *(line([cell(row.get(name, "")) for name in names]) for row in rows)]
