"""The sizes of the benchmarks, the same for r4b_jax and for every peer: plain numbers, no imports.

Models, in float32 with random weights:
  M1  a small LLaVA-OneVision: the vision tower VISION, a two-layer projector, and the decoder TEXT;
  M2  its decoder alone (the architecture of Qwen3).

Work:
  W1  rollouts: SAMPLES answers to each of PROMPTS prompts, NEW_TOKENS tokens each, temperature 1,
      none ending early;
  W2  one GRPO update on those PROMPTS x SAMPLES sequences: forward, backward, optimiser;
  W3  one supervised step on ROWS rows of ROW_LENGTH tokens, with loss on every token of text that
      another token of its document precedes: forward, backward, clipping, AdamW. M2's rows are
      DOCUMENTS documents of equal length that do not see each other; M1's are a W1 prompt and text.

The scripts have flags for the sizes of the work; those here are the flags' defaults.
"""

# The decoder, in the words of transformers' Qwen3Config; input and output embeddings are tied.
TEXT = dict(
    hidden_size=256,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=768,
    vocab_size=4096,
)
ROPE_THETA = 1e6
NORM_EPS = 1e-6

# The vision tower, in the words of transformers' SiglipVisionConfig.
VISION = dict(
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=384,
    image_size=64,
    patch_size=8,
)

# The work.
PROMPTS = 8
SAMPLES = 16
PROMPT_LENGTH = 600
NEW_TOKENS = 128
ROWS = 8
ROW_LENGTH = 1024
DOCUMENTS = 1
MICRO_BATCH = 16  # sequences per forward and backward of W2: the samples of one prompt
LEARNING_RATE = 1e-6
CLIP_NORM = 1.0  # of the gradient
CLIP_RATIO = 0.2  # of the policies

# M1's picture, one in each prompt: a base tile and 2 x 4 tiles of 64 x 64 pixels make
# 9 x 64 patches and 16 newlines. The rest of the prompt is text, IMAGE_AT tokens of it before.
IMAGE_HEIGHT, IMAGE_WIDTH = 128, 256
IMAGE_TILES = 9
IMAGE_TOKENS = 592
IMAGE_AT = 4
MAX_TILES = 9  # the possible grids are those of at most so many tiles, up to 4 x 4

# Special tokens; prompts and ready-made answers are drawn from WORDS.
PAD, EOS, BOS, VIDEO_TOKEN, IMAGE_TOKEN = 0, 1, 2, 4094, 4095
WORDS = (4, 4000)
