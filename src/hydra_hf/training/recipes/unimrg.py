"""UniMRG: after its training, a unified model paints what it sees, so that it understands better. UniMRG, section 3.

hydra train unimrg.hydra_1_5b --init hydra-1.5b --data understand=llava.json,image_root=images \\
    --data reconstruct=llava.json,image_root=images --data depth=llava.json,image_root=images,targets=targets/depth \\
    --data segment=llava.json,image_root=images,targets=targets/segment

The baselines (`sft`, `reca`) and the ablation (`pixel`, `depth`, `segment` alone) differ from it in their mixture only.
"""
