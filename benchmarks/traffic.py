"""A night's log of an online shop, answered by the target itself, for recipes/realign.yaml.

    python benchmarks/traffic.py log.jsonl [--target ID] [--rows 600]
    fastdraft run recipes/realign.yaml design.draft=DRAFT generate.sets.traffic.dataset=log.jsonl

The questions are German, in a language that the draft has not been aligned on. Every second answer
is streamed. Nothing is timed here: the run says by how much acceptance rose on held-out questions.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from fastdraft_hf.data.engines import OpenVINOEngine, Request
from fastdraft_hf.data.prompts import chat_ids
from fastdraft_hf.export.openvino import cached_openvino
from fastdraft_hf.target.resolve import load_tokenizer, resolve_target, stop_ids

THINGS = """
Wanderschuhe Zelt Schlafsack Rucksack Stirnlampe Regenjacke Fahrradhelm Kaffeemühle Teekanne Pfanne
Toaster Wasserkocher Schreibtischlampe Bürostuhl Regal Teppich Vorhang Kissen Decke Matratze Gitarre
Klavier Trommel Notenständer Kamera Stativ Objektiv Drucker Tastatur Bildschirm Kopfhörer
Lautsprecher Blumentopf Gießkanne Rasenmäher Hängematte Grill Sonnenschirm Puzzle Brettspiel
""".split()  # noqa: SIM905
QUESTIONS = (
    "Schreibe eine kurze Beschreibung für: {}",
    "Ein Kunde fragt nach dem Preis von: {}. Antworte höflich.",
    "Nenne drei Vorteile von: {}",
    "Mein {} ist kaputt angekommen. Was soll ich tun?",
    "Wie reinige ich: {}?",
    "Kann ich {} zurückgeben?",
    "Schreibe eine Bewertung mit fünf Sternen für: {}",
    "Vergleiche zwei Modelle: {}",
    "Für wen eignet sich: {}?",
    "Schreibe eine E-Mail über eine verspätete Lieferung: {}",
    "Was kostet der Versand für: {}?",
    "Gib eine Anleitung zum Aufbau: {}",
    "Welche Farben gibt es für: {}?",
    "Erkläre die Garantie für: {}",
    "Schlage ein Geschenk vor, das zu {} passt.",
)
SYSTEM = "Du bist der Assistent eines Online-Shops. Antworte auf Deutsch, freundlich und kurz."


def response(text: str, reason: str, streamed: bool) -> Any:
    """Return an answer as OpenAI's API sends it."""
    if not streamed:
        message = {"role": "assistant", "content": text}
        return {"choices": [{"index": 0, "message": message, "finish_reason": reason}]}
    words = text.split(" ")
    deltas: list[dict[str, str]] = [{"role": "assistant", "content": words[0]}]
    deltas += [{"content": f" {word}"} for word in words[1:]] + [{}]
    events = [
        {"choices": [{"index": 0, "delta": delta, "finish_reason": None if delta else reason}]}
        for delta in deltas
    ]
    return "".join(f"data: {json.dumps(one)}\n\n" for one in events) + "data: [DONE]\n\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("log", type=Path)
    parser.add_argument("--target", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, default=600)
    args = parser.parse_args()
    target, rng = resolve_target(args.target).path, random.Random(0)
    tokenizer = load_tokenizer(target, "--target")
    asked = [question.format(thing) for question in QUESTIONS for thing in THINGS]
    rng.shuffle(asked)
    chats = [[("system", SYSTEM), ("user", text)] for text in asked[: args.rows]]
    requests = [
        Request(number, chat_ids(tokenizer, chat), rng.choice([0.0, 0.6, 0.8]), number, 96, "log")
        for number, chat in enumerate(chats)
    ]
    engine = OpenVINOEngine(cached_openvino(target, "int8"), stop_ids(target, tokenizer))
    with args.log.open("w", encoding="utf-8") as file:
        for number, done in enumerate(engine.generate(requests, lambda new: None)):
            chat = chats[done.request.index]
            text = str(tokenizer.decode(done.ids, skip_special_tokens=True))
            messages = [{"role": role, "content": content} for role, content in chat]
            answered = response(text, done.finish_reason, streamed=number % 2 == 1)
            row = {"request": {"messages": messages}, "response": {"body": answered}}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"{args.log}: {len(requests)} exchanges")


if __name__ == "__main__":
    main()
