"""Settings under which a detector trains within seconds: 24 scenes of 64 pixels, batches of 4, 3 steps."""

from pathlib import Path

CONFIGS = Path(__file__).resolve().parents[2] / "detection"
_SHORT = [
    *("INPUT.IMAGE_SIZE", "64", "SOLVER.IMS_PER_BATCH", "4", "SOLVER.EPOCHS", "0.5"),
    *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", "20", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "10", "SOLVER.LOG_STEPS", "1"),
    *("MODEL.RPN.PRE_NMS_TOPK_TEST", "20", "MODEL.RPN.POST_NMS_TOPK_TEST", "10", "MODEL.DEVICE", "cpu"),
    *("DATALOADER.NUM_WORKERS", "0"),
]
TINY = [*_SHORT, "MODEL.VIT.depth", "2", "MODEL.VIT.window_size", "4", "MODEL.VIT.global_blocks", "[1]"]
TINY_CONVIT = [*TINY, "MODEL.VIT.gpsa_blocks", "1"]
TINY_SWIN = [*_SHORT, "MODEL.VIT.stage_depths", "(2, 1, 1, 1)"]
