"""What a search found, for people."""

from __future__ import annotations

from typing import Any


def design_rows(results: dict[str, Any]) -> list[dict[str, str]]:
    """Return a row a design: its shape, the times of its passes, its best γ and speed."""
    rows = []
    best = results["best"]
    for found in results["designs"]:
        prediction = found["predictions"][0]
        speeds = prediction["tokens_per_second"]
        gamma = max(speeds, key=lambda g: speeds[g])
        chosen = found["design"] == best["design"]
        rows.append(
            {
                "": "→" if chosen else "",
                "design": found["design"],
                "layers": str(found["layers"]),
                "width": str(found["width"]),
                "feed-forward": f"{found['feed_forward']:,}",
                "parameters": f"{found['params'] / 1e6:.2f}M",
                "first pass, ms": _spread(found["first_pass_seconds"]),
                "next pass, ms": _spread(found["next_pass_seconds"]),
                "acceptance": f"{prediction['acceptance']:.3f}",
                "best γ": gamma,
                "predicted tokens/s": f"{speeds[gamma]:.1f}",
            }
        )
    return rows


def _spread(seconds: list[float]) -> str:
    middle, low, high = (1e3 * value for value in seconds)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def target_rows(results: dict[str, Any]) -> list[dict[str, str]]:
    """Return a row a γ: the target's pass over γ + 1 tokens, and what a round costs beside."""
    found = results["designs"][0]
    return [
        {
            "γ": gamma,
            "target's pass over γ + 1 tokens, ms": f"{1e3 * seconds:.2f}",
            "outside the passes, ms": f"{1e3 * found['outside_seconds'][gamma]:.2f}",
        }
        for gamma, seconds in found["verify_seconds"].items()
    ]


def verdict(results: dict[str, Any]) -> list[str]:
    """Return the sentences that stand below the tables."""
    lines = [
        f"best at acceptance {best['acceptance']:.3f}: design {best['design']}, γ = "
        f"{best['num_assistant_tokens']}, {best['tokens_per_second']:.1f} tokens/s predicted"
        for best in results["best_by_acceptance"]
    ]
    if results["one_acceptance_for_all"]:
        lines.append(
            "One acceptance for all designs: the cheapest draft wins. Deeper drafts accept more; "
            "give acceptance by depth, or probe_tokens, for the other side of the trade."
        )
    if results["probed"]:
        lines.append("Acceptances are of short trainings; a full one accepts more.")
    return [*lines, results["law"]["sentence"]]


def recipe_lines(results: dict[str, Any]) -> str:
    """Return the lines of a recipe that give the best design and look at γ around the best."""
    import yaml

    sections = {"design": results["best"]["section"], "bench": bench_section(results)}
    return str(yaml.safe_dump(sections, sort_keys=False, default_flow_style=None))


def bench_section(results: dict[str, Any]) -> dict[str, Any]:
    """Return what ``bench`` is told: the best γ and its neighbours, so that it can be checked."""
    gamma = results["best"]["num_assistant_tokens"]
    return {"num_assistant_tokens": [g for g in (gamma - 1, gamma, gamma + 1) if g >= 1]}
