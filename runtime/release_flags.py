"""The flags of the release's scripts that are not flags here, and what takes their place.

Read only after a command line has failed. All other flags of the release are taken as they are.
"""

ANSWERS = {
    # main_dino.py
    "use_fp16": "--precision chooses: bf16, fp16 (with its scaling of the loss), fp32 or auto",
    "dist_url": "torchrun says where the processes meet: leave it out",
    # run_with_submitit.py
    "ngpus": "torchrun --nproc_per_node, or slurm.sh, starts the processes: leave it out",
    "nodes": "torchrun --nnodes, or slurm.sh, starts the processes: leave it out",
    "timeout": "slurm.sh has the time limit: leave it out",
    "partition": "slurm.sh has the partition: leave it out",
    "use_volta32": "slurm.sh has the kind of node: leave it out",
    "comment": "slurm.sh may have one: leave it out",
    # the evaluations
    "use_cuda": "--device chooses: auto, cuda, mps or cpu",
    "load_features": "--dump_features writes a file that torch.load reads; the vote takes seconds "
    "and is not made from it: leave it out",
    "val_freq": "the heads are tested ten times in a run: leave it out",
    "num_labels": "the class folders say how many there are: leave it out",
    "evaluate": "the heads are trained in one pass and tested at its end: leave it out",
    "bs": "frames are read one by one: leave it out",
    # video_generation.py
    "video_only": "--video takes a folder of frames: python -m evals.attention_film",
    "video_format": "the film is an MP4, or without ffmpeg a GIF: leave it out",
    "output_path": "--output_dir",
    "resize": "--image_size",
}
