"""Figures of the R-4B paper (arXiv 2508.21113) that a report stands beside; all are the paper's.

Its settings: VLMEvalKit of August 2025, greedy, up to 8192 new tokens, Qwen3-32B as judge.
"""

SOURCE = "R-4B, arXiv 2508.21113"
MAX_NEW_TOKENS, PROFILE, JUDGE = 8192, "aug2025", "Qwen3-32B"
COLUMNS = ("R-4B-RL A-T", "R-4B-Base T", "Qwen2.5-VL-7B", "Kimi-VL-A3B", "Keye-VL-8B")
OURS = COLUMNS[0]  # what an auto-thinking model compares with
# Row of the table -> the scores, in the order of COLUMNS.
TABLE: dict[str, tuple[float, ...]] = {
    "MMMU val": (68.1, 63.2, 58.6, 64.0, 66.8),
    "MMMU-Pro": (46.5, 46.7, 34.7, 49.2, 47.5),
    "MMStar": (73.1, 70.8, 64.1, 70.4, 72.8),
    "MMBench V1.1 EN dev": (84.9, 81.9, 82.1, 82.6, 89.7),
    "MMBench V1.1 CN dev": (84.7, 83.2, 81.3, 80.7, 89.8),
    "MMVet": (81.9, 85.9, 69.7, 81.9, 65.5),
    "HallusionBench": (58.9, 53.9, 55.7, 57.2, 57.3),
    "VLMs are Blind": (52.3, 47.0, 37.4, 60.8, 61.0),
    "MMVP": (80.7, 79.3, 73.3, 80.3, 79.0),
    "VisuLogic": (25.1, 22.5, 20.0, 25.0, 21.1),
    "RealWorldQA": (69.1, 70.5, 68.2, 66.1, 66.3),
    "AI2D": (86.2, 84.8, 83.9, 82.7, 85.8),
    "CharXiv DQ": (82.9, 82.8, 73.9, 75.4, 74.5),
    "CharXiv RQ": (56.8, 55.4, 42.5, 47.7, 40.0),
    "DocVQA val": (91.0, 89.6, 95.5, 69.0, 86.3),
    "OCRBench": (83.6, 82.8, 89.7, 86.2, 85.3),
    "BLINK val": (56.3, 54.8, 56.4, 56.2, 52.5),
    "CountBench": (90.2, 92.6, 74.1, 91.4, 75.4),
    "MathVision": (47.8, 45.7, 26.2, 56.8, 42.4),
    "MathVista mini": (78.0, 76.8, 66.8, 80.1, 75.2),
    "MathVerse vision": (64.9, 65.0, 41.2, 57.4, 40.8),
    "OlympiadBench": (49.6, 47.0, 19.4, 33.9, 45.2),
    "WeMath": (52.8, 54.1, 37.7, 47.0, 58.6),
    "LogicVista": (59.1, 58.8, 44.5, 51.0, 50.6),
    "DynaMath": (39.5, 36.3, 20.1, 27.1, 35.3),
}
# Figure 7: tokens a query, by mode, as far as the paper tells them.
TOKENS: dict[str, dict[str, float]] = {
    "OCRBench": {"non-thinking": 57, "auto": 66, "thinking": 394},
    "MMVet": {"auto": 82, "thinking": 331},
    "MathVista mini": {"non-thinking": 270, "auto": 996, "thinking": 1136},
    "WeMath": {"non-thinking": 408, "auto": 1278, "thinking": 1382},
}
# Choices of VLMEvalKit's that the paper does not name.
OPEN = {
    "MMMU-Pro": "the mean of the sets with ten options and in the picture; the paper does not say",
    "WeMath": "Score (Strict); the paper does not say which of the two",
    "DynaMath": "the average over variants; the paper does not say whether that or the worst case",
    "MathVerse vision": "the plain question, not the one that asks for steps; the paper does not "
    "say",
}
