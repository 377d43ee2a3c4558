"""Small generated video sets."""

import json

import numpy as np
import torch

from common.video import write_mp4


def write_video_set(
    root, episodes=3, *, length=20, cameras=1, latent_shape=None, split="train", size=64, stated=True, val_folder=True
):
    """A video set of moving squares. With `latent_shape` it has latents, all of whose values are the frame number.

    `val_folder` makes an empty val folder, so that no training video is held out.
    """
    if val_folder:
        (root / "annotation/val").mkdir(parents=True, exist_ok=True)
    for episode in range(episodes):
        record = {
            "texts": [f"move square {episode}"],
            "videos": [{"video_path": f"videos/{split}/{episode}/{c}.mp4"} for c in range(cameras)],
        }
        if stated:
            record["video_length"] = length
        if latent_shape:
            record["latent_videos"] = [
                {"latent_video_path": f"latent_videos/{split}/{episode}/{c}.pt"} for c in range(cameras)
            ]
        for camera in range(cameras):
            frames = np.full((length, size, size, 3), 40, np.uint8)
            for t in range(length):
                left = 4 + (2 * t + 10 * episode) % (size - 20)
                frames[t, 20 + 5 * camera : 36 + 5 * camera, left : left + 16, episode % 3] = 230
            write_mp4(root / record["videos"][camera]["video_path"], frames, 30)
            if latent_shape:
                path = root / record["latent_videos"][camera]["latent_video_path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(
                    torch.arange(length).float().view(-1, 1, 1, 1).expand(-1, *latent_shape).clone() + 1000 * camera,
                    path,
                )
        file = root / "annotation" / split / f"{episode}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record))
    return root
