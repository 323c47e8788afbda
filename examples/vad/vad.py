"""Is somebody speaking? The data, Silero VAD as the teacher, the students and the noise that edgekd.toml names."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor, nn

HERE = Path(__file__).parent
RATE = 16_000
CHUNK = 512
CONTEXT = 64
"""Samples before a chunk that Silero VAD hears again."""
CHUNKS = 8
LENGTH = CONTEXT + CHUNKS * CHUNK
"""A window: a quarter of a second; the question is whether somebody speaks in its last chunk."""

TRAIN_VOICES = ("en_US_f_Allison", "es_MX_f_Allison", "it_IT_m_Carlo")
VALIDATION_VOICES = ("fr_CA_f_June",)
TEST_VOICES = ("ru_RU_f_IvrvoiceRU",)
VOICES = TRAIN_VOICES + VALIDATION_VOICES + TEST_VOICES
TRAIN_MUSIC = ("macroform-cold_day", "macroform-robot_dity", "planetblupi", "singularity")
VALIDATION_MUSIC = ("macroform-the_simplicity",)
TEST_MUSIC = ("manolo_camp-morning_coffee", "reno_project-system")
MUSIC = TRAIN_MUSIC + VALIDATION_MUSIC + TEST_MUSIC
LABELLED = 1_000
UNLABELED = 23_000
SPEEDS = (0.8, 1.25)
"""Slowest and fastest that a voice without a label is played, which moves its pitch as well."""
LOUDNESS = 0.05
"""Of speech and, at 0 dB, of noise; prepare.py brings both to it."""


def train() -> dict[str, np.ndarray]:
    """1,000 clean windows of three recordings, two speakers; ``noisy`` adds the noise, view by view."""
    return {name: column[:LABELLED] for name, column in windows(TRAIN_VOICES, 12_000).items()}


def unlabeled() -> dict[str, np.ndarray]:
    """23,000 more, played slower or faster: what the teacher says of them is all that is known of them."""
    random, audio = np.random.default_rng(1), np.empty((UNLABELED, LENGTH), np.float32)
    spoken = [samples for samples, _ in recordings(TRAIN_VOICES)]
    for row in range(UNLABELED):
        samples = spoken[random.integers(len(spoken))]
        speed = random.uniform(*SPEEDS) if random.random() < 0.8 else 1.0
        begin = random.integers(len(samples) - int(LENGTH * max(SPEEDS)) - 1)
        places = begin + speed * np.arange(LENGTH)
        heard = samples[begin : int(places[-1]) + 2]
        audio[row] = np.interp(places - begin, np.arange(len(heard)), heard) / 32768
    return {"audio": audio}


def validation() -> dict[str, np.ndarray]:
    """4,000 noisy windows of a speaker and with music that no student has heard: settings are chosen on these."""
    return mixed(windows(VALIDATION_VOICES, 4_000), VALIDATION_MUSIC, seed=1)


def test() -> dict[str, np.ndarray]:
    """6,000 noisy windows of another speaker, in another language, with other music."""
    return mixed(windows(TEST_VOICES, 6_000), TEST_MUSIC, seed=2)


def windows(voices: tuple[str, ...], count: int) -> dict[str, np.ndarray]:
    """Windows from everywhere in some recordings: audio (windows, 4160), label (windows,), 1 where somebody speaks."""
    spoken = recordings(voices)
    places = [(number, chunk) for number, (_, speaks) in enumerate(spoken) for chunk in range(CHUNKS, len(speaks))]
    chosen = np.random.default_rng(0).choice(len(places), count, replace=False)
    audio, labels = np.empty((count, LENGTH), np.float32), np.empty(count, np.int64)
    for row, place in enumerate(chosen):
        number, chunk = places[place]
        samples, speaks = spoken[number]
        end = (chunk + 1) * CHUNK
        audio[row], labels[row] = samples[end - LENGTH : end] / np.float32(32768), speaks[chunk]
    return {"audio": audio, "label": labels}


def recordings(voices: tuple[str, ...]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each voice the samples, int16, and where somebody speaks, chunk by chunk."""
    path = HERE / "voices.npz"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; python prepare.py makes it")
    with np.load(path) as file:
        return [(file[name], file[f"{name} speaks"]) for name in voices]


def mixed(clean: dict[str, np.ndarray], music: tuple[str, ...], seed: int) -> dict[str, np.ndarray]:
    """The same windows with noise: one fixed view of each."""
    generator = Generator().manual_seed(seed)
    bank = noises(music)
    noisy = [with_noise(torch.from_numpy(audio), bank, generator).numpy() for audio in clean["audio"]]
    return {"audio": np.stack(noisy), "label": clean["label"]}


def noisy(sample: Mapping[str, Tensor], generator: Generator) -> dict[str, Tensor]:
    """A window (4160,) as an app may hear it: coloured, louder or softer, four times of five with noise.

    The noise is not that of the recordings alone: it is played at another speed, coloured, or two at once, so that a
    student does not learn some tracks of music by heart.
    """
    draw = torch.rand(12, generator=generator).tolist()
    audio = tinted(sample["audio"], draw[0], draw[1])
    if draw[2] >= 0.2:
        bank = noises(TRAIN_MUSIC)
        noise = tinted(piece(bank, draw[3], draw[4]), draw[5], draw[6])
        if draw[7] < 0.4:
            noise = (noise + piece(bank, draw[8], draw[9])) * 0.7
        audio = audio + noise * 10 ** (-draw[10])
    return {"audio": (audio * 10 ** ((-20 + 26 * draw[11]) / 20)).clamp(-1, 1)}


def tinted(audio: Tensor, chance: float, colour: float) -> Tensor:
    """Half of the time brighter or duller, by a filter of two taps."""
    if chance >= 0.5:
        return audio
    return audio + (1.4 * colour - 0.7) * nn.functional.pad(audio[:-1], (1, 0))


def piece(bank: Tensor, where: float, speed: float) -> Tensor:
    """A window of noise, played at 2/3 to 3/2 of its speed."""
    length = round(LENGTH * 1.5 ** (2 * speed - 1))
    begin = int(where * (len(bank) - length))
    heard = bank[begin : begin + length]
    return nn.functional.interpolate(heard[None, None], LENGTH, mode="linear")[0, 0]


def with_noise(audio: Tensor, bank: Tensor, generator: Generator) -> Tensor:
    """A window with noise at 0 to 20 dB below speech, or none (one time of five), and a gain of −20 to 6 dB."""
    signal_to_noise, gain, silent, where = torch.rand(4, generator=generator).tolist()
    if silent >= 0.2:
        begin = int(where * (len(bank) - LENGTH))
        audio = audio + bank[begin : begin + LENGTH] * 10 ** (-signal_to_noise)
    return (audio * 10 ** ((-20 + 26 * gain) / 20)).clamp(-1, 1)


@functools.cache
def noises(music: tuple[str, ...]) -> Tensor:
    """Music, then as much noise again, white, pink and brown by thirds: (samples,), all of one loudness."""
    path = HERE / "music.npz"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; python prepare.py makes it")
    with np.load(path) as file:
        tracks = [file[name].astype(np.float32) / 32768 for name in music]
    length = sum(map(len, tracks)) // 3
    random = np.random.default_rng(len(music))
    colours = [coloured(random.standard_normal(length), power) for power in (0.0, 1.0, 2.0)]
    return torch.from_numpy(np.concatenate([*tracks, *colours]))


def coloured(white: np.ndarray, power: float) -> np.ndarray:
    """Noise whose power falls with frequency to ``power``, not below 20 Hz."""
    spectrum = np.fft.rfft(white)
    frequency = np.maximum(np.fft.rfftfreq(len(white), 1 / RATE), 20)
    noise = np.fft.irfft(spectrum / frequency ** (power / 2), len(white))
    return (noise * LOUDNESS / noise.std()).astype(np.float32)


class Silero(nn.Module):
    """Silero VAD 6 for 16 kHz (Silero Team, MIT): a spectrum, four convolutions, an LSTM; 309,633 parameters.

    The layers and their names are those of its weights. It hears a window chunk by chunk, from silence; audio
    (batch, 4160) to logits (batch, 2), of which the second is that of its speech probability and the first is zero.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.lstm_cell = nn.LSTMCell(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def forward(self, audio: Tensor) -> Tensor:
        chunks = audio.unfold(1, CONTEXT + CHUNK, CHUNK).reshape(-1, CONTEXT + CHUNK)
        spectrum = self.stft_conv(nn.functional.pad(chunks, (0, 64), mode="reflect").unsqueeze(1))
        features = (spectrum[:, :129] ** 2 + spectrum[:, 129:] ** 2).sqrt()
        for convolution in (self.conv1, self.conv2, self.conv3, self.conv4):
            features = torch.relu(convolution(features))
        state: tuple[Tensor, Tensor] | None = None
        for heard in features.squeeze(2).reshape(-1, CHUNKS, 128).unbind(1):
            state = self.lstm_cell(heard, state)
        assert state is not None
        logit = self.final_conv(torch.relu(state[0]).unsqueeze(2)).squeeze(2)
        return torch.cat([torch.zeros_like(logit), logit], dim=1)


def teacher() -> nn.Module:
    """Silero VAD as its package ships it; the package itself is not imported.

    Raises:
        FileNotFoundError: It is not installed.
    """
    from safetensors.torch import load_file

    spec = importlib.util.find_spec("silero_vad")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("Silero VAD is not installed; pip install --no-deps silero-vad==6.2.3")
    folder = Path(next(iter(spec.submodule_search_locations)))
    model = Silero()
    model.load_state_dict(load_file(folder / "data" / "silero_vad_16k.safetensors"))
    return model.eval()


class Student(nn.Module):
    """Loudness of some bands over time, learned from mel bands on, then three convolutions over time.

    Args:
        bands: Of the spectrum.
        channels: Of the convolutions.
    """

    def __init__(self, bands: int, channels: int) -> None:
        super().__init__()
        self.filters = nn.Conv1d(1, 2 * bands, 256, stride=128, bias=False)
        self.filters.weight.data.copy_(mel_filters(bands))
        self.norm = nn.BatchNorm1d(bands)
        self.features = nn.Sequential(
            convolution(bands, channels, 5, 2),  # 31 frames of 8 ms to 16
            convolution(channels, channels, 5, 2),  # 8
            convolution(channels, channels, 3, 2),  # 4
        )
        self.classifier = nn.Linear(2 * channels, 2)

    def forward(self, audio: Tensor) -> Tensor:
        real, imaginary = self.filters(audio.unsqueeze(1)).chunk(2, dim=1)
        features = self.features(self.norm(torch.log(real**2 + imaginary**2 + 1e-6)))
        return self.classifier(torch.cat([features.mean(2), features[:, :, -1]], dim=1))


def convolution(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    """Convolution over time, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv1d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()
    )


def mel_filters(bands: int) -> Tensor:
    """Cosines, then sines, at frequencies that are evenly spaced in mel, under a Hann window: (2 · bands, 1, 256)."""
    mel = torch.linspace(2595 * math.log10(1 + 60 / 700), 2595 * math.log10(1 + 7600 / 700), bands)
    frequency = 700 * (10 ** (mel / 2595) - 1)
    phase = 2 * math.pi * frequency[:, None] * torch.arange(256) / RATE
    window = torch.hann_window(256) / 8
    return torch.cat([phase.cos() * window, phase.sin() * window])[:, None]


def student() -> nn.Module:
    """A student to train: 15 % of the teacher's parameters."""
    return Student(bands=32, channels=48)
