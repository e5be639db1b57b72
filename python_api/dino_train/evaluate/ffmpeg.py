"""Reading and writing videos with the ffmpeg program, if it is installed."""

import shutil
import subprocess
import tempfile
from collections.abc import Generator, Sequence
from pathlib import Path

from PIL import Image

SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v")


def is_video(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()


def read(path: Path, fps: float) -> Generator[Image.Image, None, None]:
    """The frames of a video at `fps` frames per second, as RGB images.

    Raises:
        ValueError: ffmpeg is not installed, or cannot read the video.
    """
    program = shutil.which("ffmpeg")
    if program is None:
        raise ValueError(f"reading {path} needs the program ffmpeg: install it, or pass a folder with the frames")
    command = [program, "-v", "error", "-nostdin", "-i", str(path), "-vf", f"fps={fps}", "-f", "image2pipe"]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen([*command, "-c:v", "ppm", "-"], stdout=subprocess.PIPE, stderr=errors)
        assert process.stdout is not None
        count = 0
        try:
            # A frame is "P6\n<width> <height>\n255\n" followed by the pixels.
            while process.stdout.readline():
                width, height = map(int, process.stdout.readline().split())
                process.stdout.readline()
                data = process.stdout.read(3 * width * height)
                if len(data) < 3 * width * height:
                    break
                count += 1
                yield Image.frombytes("RGB", (width, height), data)
            process.stdout.close()
            if process.wait() or not count:
                errors.seek(0)
                reason = errors.read().decode(errors="replace").strip().splitlines() or ["it has no frame"]
                raise ValueError(f"{path} cannot be read as a video: {reason[-1]}")
        finally:
            process.kill()
            process.wait()


def write(frames: Sequence[Path], path: Path, fps: float) -> Path | None:
    """Write an MP4 (H.264) of image files of equal size; None if ffmpeg is not installed. Odd sides lose a pixel.

    Raises:
        ValueError: the images differ in size, or ffmpeg fails.
    """
    program = shutil.which("ffmpeg")
    if program is None:
        return None
    sizes = set()
    for frame in frames:
        with Image.open(frame) as picture:
            sizes.add(picture.size)
    if len(sizes) > 1:
        raise ValueError(f"frames of a video must have one size, got {' and '.join(f'{w}x{h}' for w, h in sizes)}")
    temporary = path.with_name(f"{path.stem}.tmp{path.suffix}")
    # Frames are piped: a file name pattern would require consecutive numbers in one folder.
    command = [program, "-v", "error", "-y", "-f", "image2pipe", "-framerate", str(fps), "-c:v", "png", "-i", "-"]
    command += ["-vf", "crop=trunc(iw/2)*2:trunc(ih/2)*2", "-c:v", "libx264", "-pix_fmt", "yuv420p", str(temporary)]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=errors)
        assert process.stdin is not None
        try:
            for frame in frames:
                process.stdin.write(frame.read_bytes())
            process.stdin.close()
        except BrokenPipeError:
            pass  # ffmpeg's own message is reported below
        if process.wait():
            errors.seek(0)
            temporary.unlink(missing_ok=True)
            reason = errors.read().decode(errors="replace").strip().splitlines() or ["unknown error"]
            raise ValueError(f"ffmpeg cannot write {path}: {reason[-1]}")
    return temporary.replace(path)
