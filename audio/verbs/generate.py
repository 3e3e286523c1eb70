"""`polymamba audio generate`: a model makes sound, into files, or onto stdout as it goes."""

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import numpy as np
import soundfile

from ...core.device import autocast
from ...core.errors import InputError
from ...core.files import require_writable, written_whole
from ...core.generation import load_state, save_state
from ...core.terminal import progress_bar, say
from ..codec import decode, encode
from ..commands import Generate
from ..generation import Begun, Watchdog, begin, write_on
from ..model import AudioModel, Guided
from ..plots import plot_sounds
from ..reading import WRITABLE, inspect, samples
from .common import load_model, tell_changes

LARGEST = 32767  # of 16 bits
MP3_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
FORMATS = {".wav": ("WAV", "PCM_16"), ".flac": ("FLAC", "PCM_16"), ".ogg": ("OGG", "VORBIS"), ".mp3": ("MP3", None)}


def generate(args: Generate) -> None:
    """Prompt and continuation into each output; how fast it went is said on stderr."""
    outputs = _outputs(args)
    for path in (*outputs, *([args.save_state] if args.save_state else [])):
        require_writable(path)
    model = load_model(args.run, args.compute)
    if any(path.suffix.lower() == ".mp3" for path in outputs) and model.config.sample_rate not in MP3_RATES:
        raise InputError(
            f"{outputs[0]}: mp3 has no {model.config.sample_rate} Hz, which is the model's rate; write .wav"
        )
    prompt, label = _prompt(args, model), _label(args, model)
    n, rate = max(1, round(args.seconds * model.config.sample_rate)), model.config.sample_rate
    watchdog = Watchdog(model.config) if args.watchdog else None
    guided = model if args.guidance == 1 else Guided(model, args.guidance)
    with autocast(args.compute):
        if args.state is not None:
            begun = load_state(args.state, cast(Any, _Saved(model)))
        else:
            with progress_bar("prompt", 0 if prompt is None else len(prompt), "samples") as advance:
                begun = begin(guided, prompt, label, advance=advance)
        _say_format(args, rate)
        seeds = [args.compute.seed + i for i in range(args.n)]
        for _ in write_on(guided, begun, 1, args.sampling, seeds, block=1):
            pass  # so that the time told below is not that of compiling
        began = time.monotonic()
        block = _block(model)
        steps = write_on(guided, begun, n, args.sampling, seeds, block=block, watchdog=watchdog)
        waves = _write(args, outputs, model, prompt, steps, n)
    taken = time.monotonic() - began
    say(
        f"{args.n} x {n / rate:.2f} s of sound in {taken:.2f} s: {args.n * n / taken:,.0f} samples/s, "
        f"{n / rate / taken:.2f} times real time"
    )
    if watchdog is not None and watchdog.n_again:
        say(f"the watchdog had {watchdog.n_again} blocks of noise written again")
    for path, wave in zip(outputs, waves, strict=True):
        plot_sounds(path.with_suffix(".png"), [wave], [rate], [path.name])


def _write(
    args: Generate, outputs: list[Path], model: AudioModel, prompt: np.ndarray | None, steps: Iterator, n: int
) -> list[np.ndarray]:
    """All that is written, as it comes; the sound of each output."""
    rate = model.config.sample_rate
    said = [_pcm(model, prompt)] if prompt is not None else []
    kept = [list(said) for _ in outputs]
    with ExitStack() as stack:
        files = [stack.enter_context(_sound_file(path, rate)) for path in outputs]
        for file in files:
            for pcm in said:
                file.write(pcm)
        if args.stdout:
            _to_stdout(said)
        with progress_bar("sound", n / rate, "s") as advance:
            for codes, writer in steps:
                last = writer
                pcm = _pcm(model, codes)
                for row, (file, pieces) in enumerate(zip(files, kept, strict=True)):
                    file.write(pcm[row])
                    pieces.append(pcm[row])
                if args.stdout:
                    _to_stdout([pcm[0]])
                advance(codes.shape[1] / rate)
        if args.save_state is not None:
            save_state(args.save_state, Begun(last.state, last.unread))
    return [np.concatenate(pieces).astype(np.float32) / LARGEST for pieces in kept]


class _sound_file:
    """A sound file that is written to as a whole or not at all."""

    def __init__(self, path: Path, rate: int):
        self.whole = written_whole(path)
        self.kind, self.subtype = FORMATS[path.suffix.lower()]
        self.rate = rate

    def __enter__(self) -> Any:
        self.file = soundfile.SoundFile(
            self.whole.__enter__(), "w", self.rate, 1, subtype=self.subtype, format=self.kind
        )
        return self.file

    def __exit__(self, *error: Any) -> None:
        self.file.close()
        self.whole.__exit__(*error)


def _to_stdout(pieces: list[np.ndarray]) -> None:
    for piece in pieces:
        sys.stdout.buffer.write(piece.astype("<i2").tobytes())
    sys.stdout.buffer.flush()


def _pcm(model: AudioModel, codes: np.ndarray) -> np.ndarray:
    return np.rint(decode(codes, model.config.codec) * LARGEST).astype(np.int16)


def _block(model: AudioModel) -> int:
    """A quarter of a second, in whole periods."""
    period = model.config.unet.period
    return max(1, model.config.sample_rate // 4 // period) * period


def _outputs(args: Generate) -> list[Path]:
    if args.output is None:
        return []
    suffix = args.output.suffix.lower()
    if suffix not in WRITABLE:
        raise InputError(f"{args.output}: its ending must be one of {', '.join(WRITABLE)}")
    if args.n == 1:
        return [args.output]
    digits = len(str(args.n))
    return [args.output.with_stem(f"{args.output.stem}-{i + 1:0{digits}}") for i in range(args.n)]


def _prompt(args: Generate, model: AudioModel) -> np.ndarray | None:
    """Codes uint8 (n,)."""
    if args.prompt is None:
        return None
    sound, config = inspect(args.prompt), model.config
    if sound.n_frames == 0:
        raise InputError(f"{args.prompt}: a sound of 0 seconds; leave --prompt out to begin with nothing")
    tell_changes([sound], config.sample_rate)
    most = None if args.prompt_seconds is None else max(1, round(args.prompt_seconds * config.sample_rate))
    pieces, n = [], 0
    for block in samples(sound, config.sample_rate):
        pieces.append(encode(block if most is None else block[: most - n], config.codec))
        n += len(pieces[-1])
        if most is not None and n >= most:
            break
    return np.concatenate(pieces)


def _label(args: Generate, model: AudioModel) -> int | None:
    if args.label is None:
        return None
    labels = model.config.labels
    if args.label not in labels:
        known = f"it knows {', '.join(labels)}" if labels else "it was trained without --labels"
        raise InputError(f"--label {args.label}: not a label of this model; {known}")
    return labels.index(args.label)


class _Saved:
    """What `load_state` asks for the shapes of a saved state."""

    def __init__(self, model: AudioModel):
        self.model = model

    def init_state(self, batch_size: int) -> Begun:
        state = self.model.init_state(batch_size)
        return Begun(state, state.label)


def _say_format(args: Generate, rate: int) -> None:
    if args.stdout:
        say(f"stdout: raw samples, 16 bits, signed, little-endian, mono, {rate} Hz (aplay -f S16_LE -r {rate} -c 1)")
