"""What is computed from the rounds of a comparison, and its table. Needs the standard library alone.

A record is what compare.py writes for a model and a class of formats: "systems" (a name such as
"openvino int8" to what is constant: weight bytes, peak, load times, versions, note), "failed" (a name
to the reason), "lengths", and "rounds", each with "read_gb_per_s" (the samples of that round) and
"measured" (a name to {"decode": {"1": runs, "8": runs}, "prefill": runs, "others", "stolen"}, runs
being lists "first_ms" and "step_ms", the last two what part of the processor's time other programs and
the host took).
"""

import statistics

ORDER = ["f32", "16bit", "int8", "int4"]


def rate(tokens, times_ms):
    """Tokens a second from the median time of a round's runs."""
    return tokens * 1e3 / statistics.median(times_ms)


def rounds_of(record, name):
    """The rounds that a system was measured in, as dicts of a figure's name to its value."""
    lengths = record["lengths"]
    found = []
    for one in record["rounds"]:
        if name not in one["measured"]:
            continue
        measured = one["measured"][name]
        figures = {"prefill": rate(lengths["prefill"], measured["prefill"]["first_ms"])}
        for batch, runs in measured["decode"].items():
            figures[f"decode {batch}"] = rate(int(batch), runs["step_ms"])
        if alone := measured["decode"].get("1"):
            figures["first_ms"] = statistics.median(alone["first_ms"])
            figures["share"] = share(
                record["systems"][name]["weight_bytes"], figures["decode 1"], statistics.median(one["read_gb_per_s"])
            )
        found.append(figures)
    return found


def share(weight_bytes, steps_per_s, read_gb_per_s):
    """Of the read bandwidth, if every step reads each byte of the weights once."""
    return weight_bytes * steps_per_s / (read_gb_per_s * 1e9)


def spread(values):
    """Median, smallest and largest."""
    return statistics.median(values), min(values), max(values)


def ratios(record, name, rival, figure):
    """Of two systems' rates in each round that has both: the median, or None."""
    pairs = zip(by_round(record, name, figure), by_round(record, rival, figure))
    found = [one / other for one, other in pairs if one and other]
    return statistics.median(found) if found else None


def by_round(record, name, figure):
    """A value for each round, None where the system has none."""
    rounds = [record | {"rounds": [one]} for one in record["rounds"]]
    return [next((figures.get(figure) for figures in rounds_of(one, name)), None) for one in rounds]


def rows(record):
    """The table's rows, kiln first."""
    batches = record["lengths"]["batches"]
    names = sorted(record["systems"], key=lambda name: not name.startswith("kiln "))
    kilns = [name for name in names if name.startswith("kiln ") and rounds_of(record, name)]
    found = []
    for name in names:
        system, rounds = record["systems"][name], rounds_of(record, name)
        row = {"system": name, "weights MB": f"{system['weight_bytes'] / 1e6:.0f}"}
        if rounds:
            for batch in batches:
                row[f"decode, batch {batch}"] = shown([figures[f"decode {batch}"] for figures in rounds])
            if 1 in batches:
                row["share"] = f"{statistics.median(figures['share'] for figures in rounds):.0%}"
                row["first token ms"] = f"{statistics.median(figures['first_ms'] for figures in rounds):.0f}"
            row["prefill"] = shown([figures["prefill"] for figures in rounds])
            figures = [f"decode {batch}" for batch in batches] + ["prefill"]
            for kiln in kilns:
                if name not in kilns:
                    row[f"{kiln}/peer"] = " · ".join(f"{ratios(record, kiln, name, figure):.2f}" for figure in figures)
        row["peak MB"] = f"{system['peak_bytes'] / 1e6:.0f}" if system.get("peak_bytes") else ""
        row["load ms"] = f"{statistics.median(system['load_ms']):.0f}" if system.get("load_ms") else ""
        row["note"] = "; ".join(note for note in (system.get("note"), failure(record, name)) if note)
        found.append(row)
    found += [{"system": name, "note": failure(record, name)} for name in record["failed"] if name not in record["systems"]]
    return found


def failure(record, name):
    reason = record["failed"].get(name)
    return f"not measured: {reason}" if reason else ""


def shown(values):
    """The median, and the spread of more than one."""
    digits = 1 if statistics.median(values) < 100 else 0
    middle, least, most = (f"{value:.{digits}f}" for value in spread(values))
    return middle if len(values) == 1 else f"{middle} ({least} to {most})"


def markdown(records):
    """The summary of all records of a folder."""
    models = dict.fromkeys(record["model"] for record in records)
    lines = ["# kiln and its peers on the CPU, in turn", "", *explanation(records[0])]
    for model in models:
        lines += ["", f"## {model}"]
        of_model = [record for record in records if record["model"] == model]
        for record in sorted(of_model, key=lambda record: ORDER.index(record["class"])):
            reads = [sample for one in record["rounds"] for sample in one["read_gb_per_s"]]
            bandwidth = "read bandwidth {:.1f} GB/s ({:.1f} to {:.1f})".format(*spread(reads)) if reads else "no round"
            lines += ["", f"{record['class']}, commit {record['commit']}, {record['date']}: {counted(record['rounds'])}, {bandwidth}{disturbance(record)}.", "", *table(rows(record))]
    versions = dict.fromkeys(
        system["versions"] for record in records for system in record["systems"].values() if system.get("versions")
    )
    lines += ["", "## Versions", "", *(f"- {version}" for version in versions)]
    return "\n".join(lines) + "\n"


def disturbance(record):
    """What other programs and the host took of the processor at most in a turn, where that is known."""
    turns = [turn for one in record["rounds"] for turn in one["measured"].values() if "others" in turn]
    if not turns:
        return ""
    worst = max(turns, key=lambda turn: turn["others"] + turn["stolen"])
    return f", other programs took {worst['others']:.0%} of the processor and the host {worst['stolen']:.0%} in the worst turn"


def counted(rounds):
    return f"{len(rounds)} round{'' if len(rounds) == 1 else 's'}"


def explanation(record):
    machine, lengths = record["machine"], record["lengths"]
    return [
        f"{machine['processor']}, {machine['cores']} cores, "
        f"{machine['memory_gib']:.0f} GiB, Linux {machine['kernel']}; {record['threads']} threads. Random weights, greedy.",
        "",
        f"- decode: tokens/s of all sequences, {lengths['steps']} steps after prompts of {lengths['prompt']} tokens; "
        f"prefill: tokens/s of one prompt of {lengths['prefill']} tokens; first token: after {lengths['prompt']} tokens.",
        "- A figure is the median of the rounds, each the median of its runs; in brackets the lowest and highest round.",
        "- share: weight bytes by steps/s at batch 1, over the read bandwidth measured in the same round.",
        "- kiln .../peer: kiln's tokens/s over the peer's at " +
        ", ".join(f"batch {batch}" for batch in lengths["batches"]) + " and in prefill, median of the rounds' ratios.",
        "- peak: resident memory up to the last measurement, of the whole process, Python included; load: of the model, "
        "from files in the file cache, without the start of Python but with what a peer imports then.",
    ]


def table(rows):
    """A Markdown table of dicts, columns in the order of the first row that has most of them."""
    names = list(max(rows, key=len)) if rows else []
    names += [name for row in rows for name in row if name not in names]
    names = list(dict.fromkeys(name for name in names if name != "note")) + ["note"]
    cell = lambda value: str(value).replace("|", "\\|").replace("\n", " ")
    line = lambda cells: f"| {' | '.join(cells)} |"
    return [line(names), line(["---"] * len(names)), *(line([cell(row.get(name, "")) for name in names]) for row in rows)]
