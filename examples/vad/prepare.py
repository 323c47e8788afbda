"""Recorded voices and music of Debian packages to voices.npz and music.npz, 16 kHz, 16 bits.

Each voice is one long recording: the prompts of one speaker, brought to one loudness, with pauses of up to three
seconds between them. Beside it stands, chunk by chunk, whether somebody speaks.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
from vad import CHUNK, MUSIC, RATE, VOICES

ASTERISK = Path("/usr/share/asterisk")
GAMES = {
    "planetblupi": Path("/usr/share/planetblupi/music"),
    "singularity": Path("/usr/share/games/singularity/music"),
}
"""Folders of music in Ogg files, all of one name together."""
MINUTES = 2
"""Of each of these files at most."""
LOUDNESS = 0.05
"""Root mean square of what is spoken; full scale is 1."""
BELOW_PEAK_DB = 30.0
SHORT_PAUSE = 3
"""Chunks: a shorter pause is part of the speech."""


def decoded(path: Path) -> np.ndarray:
    """Samples of a G.722 file, −1…1."""
    import av

    with av.open(str(path), format="g722") as file:
        frames = [frame.to_ndarray().reshape(-1) for frame in file.decode(audio=0)]
    return np.concatenate(frames).astype(np.float32) / 32768 if frames else np.zeros(0, np.float32)


def game_music(folder: Path) -> np.ndarray:
    """The files of a folder one after another, 16 kHz, of one loudness."""
    import av

    tracks = []
    for path in sorted(folder.rglob("*.ogg")):
        resampler = av.AudioResampler(format="flt", layout="mono", rate=RATE)
        with av.open(str(path)) as file:
            frames = [
                part.to_ndarray().reshape(-1) for frame in file.decode(audio=0) for part in resampler.resample(frame)
            ]
        track = np.concatenate(frames)[: MINUTES * 60 * RATE]
        tracks.append(track * LOUDNESS / np.sqrt(np.mean(track**2)))
    if not tracks:
        sys.exit(f"no {folder}; README.md has the line that installs it")
    return np.concatenate(tracks)


def speaks(prompt: np.ndarray) -> np.ndarray:
    """Where somebody speaks in a clean recording: (chunks,) of bool.

    A chunk is speech if its level is less than 30 dB below the loud ones of its recording (their 95th percentile), or
    if it lies in a pause of less than 0.1 s.
    """
    chunks = prompt[: len(prompt) // CHUNK * CHUNK].reshape(-1, CHUNK)
    level = 10 * np.log10(np.mean(chunks**2, axis=1) + 1e-10)
    active = level > np.percentile(level, 95) - BELOW_PEAK_DB
    loud = np.flatnonzero(active)
    for before, after in itertools.pairwise(loud):
        if after - before <= SHORT_PAUSE:
            active[before:after] = True
    return active


def voice(name: str) -> tuple[np.ndarray, np.ndarray]:
    """All prompts of a speaker: samples (chunks · 512,), int16, and where somebody speaks (chunks,), bool."""
    files = sorted((ASTERISK / "sounds" / name).rglob("*.g722"))
    files = [path for path in files if path.parent.name not in ("silence", "dictate") and "beep" not in path.name]
    if not files:
        sys.exit(f"no {ASTERISK / 'sounds' / name}; README.md has the line that installs it")
    random = np.random.default_rng(0)
    samples, active = [], []
    for path in files:
        prompt = decoded(path)
        if len(prompt) < RATE // 2:
            continue
        spoken = speaks(prompt)
        prompt = prompt[: len(spoken) * CHUNK]
        loudness = float(np.sqrt(np.mean(prompt.reshape(-1, CHUNK)[spoken] ** 2)))
        pause = int(random.integers(0, 3 * RATE // CHUNK + 1))
        samples += [prompt * LOUDNESS / loudness, np.zeros(pause * CHUNK, np.float32)]
        active += [spoken, np.zeros(pause, bool)]
    return whole(np.concatenate(samples)), np.concatenate(active)


def whole(samples: np.ndarray) -> np.ndarray:
    """As 16-bit numbers."""
    return (samples.clip(-1, 1) * 32767).round().astype(np.int16)


def main() -> None:
    """Write both files and say how long they are."""
    arrays = {}
    for name in VOICES:
        arrays[name], arrays[f"{name} speaks"] = voice(name)
        share = arrays[f"{name} speaks"].mean()
        print(f"{name}: {len(arrays[name]) / RATE / 60:.1f} minutes, {share:.0%} speech")
    np.savez(Path(__file__).parent / "voices.npz", **arrays)
    music = {}
    for name in MUSIC:
        track = game_music(GAMES[name]) if name in GAMES else decoded(ASTERISK / "moh" / f"{name}.g722")
        music[name] = whole(track * LOUDNESS / np.sqrt(np.mean(track**2)))
        print(f"{name}: {len(track) / RATE / 60:.1f} minutes")
    np.savez(Path(__file__).parent / "music.npz", **music)


if __name__ == "__main__":
    main()
