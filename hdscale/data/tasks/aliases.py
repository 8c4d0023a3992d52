"""Other names of the package's tasks: those of the paper's release, of MRQA's files and of the hub."""

from __future__ import annotations

ALIASES = {
    "SQuAD": "squad",
    "HotpotQA": "hotpotqa",
    "TriviaQA": "triviaqa",
    "TriviaQA-web": "triviaqa",
    "NewsQA": "newsqa",
    "SearchQA": "searchqa",
    "NaturalQuestions": "naturalquestions",
    "NaturalQuestionsShort": "naturalquestions",
    "BioASQ": "bioasq",
    "DROP": "drop",
    "DuoRC": "duorc",
    "DuoRC.ParaphraseRC": "duorc",
    "RACE": "race",
    "RelationExtraction": "relationextraction",
    "TextbookQA": "textbookqa",
    "wiki_lingua_english_en": "wiki_lingua",
    "wiki_lingua_english": "wiki_lingua",
}


def canonical(name: str) -> str:
    """The package's name of a task; any other name as it is."""
    return ALIASES.get(name, name)
