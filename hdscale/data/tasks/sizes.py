"""Rows of each split of the full data, as the paper's Tables 10-12 state them."""

from __future__ import annotations

TABLE_10 = {
    "cola": {"train": 8551, "validation": 521, "test": 522},
    "sst2": {"train": 66349, "validation": 1000, "test": 872},
    "stsb": {"train": 5749, "validation": 750, "test": 750},
    "mrpc": {"train": 3668, "validation": 204, "test": 204},
    "qqp": {"train": 362846, "validation": 1000, "test": 40430},
    "mnli": {"train": 392702, "validation": 9832, "test": 9815},
    "qnli": {"train": 103743, "validation": 1000, "test": 5463},
    "rte": {"train": 2490, "validation": 138, "test": 139},
}
"""GLUE."""

TABLE_11 = {
    "squad": {"train": 86588, "validation": 10507},
    "hotpotqa": {"train": 72928, "validation": 5901},
    "triviaqa": {"train": 61688, "validation": 7785},
    "newsqa": {"train": 74160, "validation": 4212},
    "searchqa": {"train": 117384, "validation": 16980},
    "naturalquestions": {"train": 104071, "validation": 12836},
    "bioasq": {"validation": 1504},
    "drop": {"validation": 1503},
    "duorc": {"validation": 1501},
    "race": {"validation": 674},
    "relationextraction": {"validation": 2948},
    "textbookqa": {"validation": 1503},
}
"""MRQA, in questions, before chunking."""

TABLE_12 = {
    "xsum": {"train": 204045, "validation": 11332, "test": 11334},
    "cnn_dailymail": {"train": 287113, "validation": 13368, "test": 11490},
    "wiki_lingua": {"train": 99020, "validation": 13823, "test": 28614},
    "mnli": {"train": 392702, "validation": 9832, "test": 9815},
    "art": {"train": 168654, "validation": 1000, "test": 1532},
    "anli": {"train": 162865, "validation": 3200, "test": 3200},
}
"""Summarisation and NLI."""
