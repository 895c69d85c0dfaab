"""Small sources in the layouts of the published datasets, with the oddities of the real ones."""

import csv
import io
import json
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from PIL import Image

UIDS = [f"{number:032x}" for number in range(1, 13)]
POINTS = 64
CLIPS = {1: "-4wsuPCjDBc_5_15", 2: "a_b-c_0_9", 1200: "lastTrain_1_2", 1201: "validation_3_4"}
CLIPS |= {1301: "firstTest_0_10", 1970: "zzit5b_-ukg_5_20"}


def dump(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def picture(number: int, size: tuple[int, int] = (12, 8)) -> Image.Image:
    """Return a picture of a colour of its own, with a white corner at the upper left."""
    image = Image.new("RGB", size, (40 + 7 * number % 200, 31 * number % 256, 90))
    image.paste((255, 255, 255), (0, 0, 3, 2))
    return image


def write_image(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(number).save(path, "JPEG", quality=95)


def coco_name(folder: str, number: int) -> str:
    return f"COCO_{folder}_{number:012d}.jpg"


def write_coco_images(root: Path) -> None:
    for number in range(1, 7):
        write_image(root / "train2014" / coco_name("train2014", number), number)
    for number in range(101, 106):
        write_image(root / "val2014" / coco_name("val2014", number), number)


def write_coco(root: Path) -> None:
    """Six training images with two captions, five test images with five."""
    write_coco_images(root)
    train = [
        {"image_id": image, "id": 100 * image + number, "caption": f"image {image} text {number}\n"}
        for number in (2, 1)
        for image in (6, 1, 2, 3, 4, 5)
    ]
    val = [
        {"image_id": image, "id": 10 * image + number, "caption": f" Image {image},  nr {number}. "}
        for image in range(101, 106)
        for number in range(5)
    ]
    for split, annotations in (("train", train), ("val", val)):
        content = {"info": {}, "images": [], "licenses": [], "annotations": annotations}
        dump(root / "annotations" / f"captions_{split}2014.json", content)


def write_karpathy(root: Path) -> None:
    """Karpathy's file: two test images."""
    images = [
        {
            "filepath": "val2014",
            "filename": coco_name("val2014", number),
            "split": "test" if number in (102, 104) else "restval",
            "cocoid": number,
            "sentences": [{"raw": f"raw {number} {n}", "sentid": 9 * number + n} for n in range(5)],
        }
        for number in range(101, 106)
    ]
    dump(root / "dataset_coco.json", {"images": images, "dataset": "coco"})


def write_okvqa(root: Path) -> None:
    """Three training questions on two images, three test questions."""
    write_coco_images(root)
    given = {
        "train": {
            (1, 10): "pony tail,pony tail,braid,braid,ponytail,ponytail,braid,braid, braid,braid ",
            (1, 11): "dog," * 9 + "dog",
            (2, 20): "a,a,b,b,a,a,a,a,a,a",
        },
        "val": {
            (101, 1010): "race,race,motocross,motocross,ride,ride,race,race,race,race",
            (101, 1011): "two,two,2,2,two,two,2,2,three,three",
            (103, 1030): "tennis," * 9 + "tennis",
        },
    }
    for split, questions in given.items():
        asked = [
            {"image_id": image, "question_id": number, "question": f"What is {number}?"}
            for image, number in questions
        ]
        answers = [
            {
                "image_id": image,
                "question_id": number,
                "answers": [
                    {"answer_id": n, "answer": text, "raw_answer": f"the {text}"}
                    for n, text in enumerate(texts.split(","), start=1)
                ],
            }
            for (image, number), texts in questions.items()
        ]
        dump(root / f"OpenEnded_mscoco_{split}2014_questions.json", {"questions": asked})
        dump(root / f"mscoco_{split}2014_annotations.json", {"annotations": answers})


def clip_bytes(container: str, codec: str, frames: int, shade: int, side: int = 32) -> bytes:
    """Return a clip whose brightness rises by 8 a frame from `shade` on."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as target:
        stream = target.add_stream(codec, rate=10)
        stream.width, stream.height = side, side
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for index in range(frames):
            pixels = np.full((side, side, 3), shade + 8 * index, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                target.mux(packet)
        for packet in stream.encode():
            target.mux(packet)
    return buffer.getvalue()


def write_clips(root: Path) -> None:
    """AVI and MP4, Motion JPEG and MPEG-4; the first test clip has one frame."""
    folder = root / "YouTubeClips"
    folder.mkdir(parents=True, exist_ok=True)
    for place, (number, name) in enumerate(CLIPS.items()):
        codec = ("mpeg4", "mjpeg")[place % 2]
        container = "mp4" if number == 2 else "avi"
        frames = 1 if number == 1301 else 12
        content = clip_bytes(container, codec, frames, 10 + 12 * place)
        (folder / f"{name}.{container}").write_bytes(content)
    lines = [f"{name} vid{number}\r\n" for number, name in CLIPS.items()]
    (root / "youtube_mapping.txt").write_bytes("".join(lines).encode())


def write_msvd(root: Path) -> None:
    """Three training clips with four captions, two test clips with three and two."""
    write_clips(root)
    lines = ["# MSVD", "", "zzit5b_-ukg_5_20 a cat is eating", "firstTest_0_10 a man sings"]
    lines += [f"{CLIPS[1]} a squirrel is eating a peanut in it's shell", f"{CLIPS[1]} eats"]
    lines += ["unknownClip_0_1 nothing", f"{CLIPS[1201]} not used", f"{CLIPS[1]} eats"]
    lines += [f"{name} a person walks" for name in (CLIPS[2], CLIPS[1200], CLIPS[1970])]
    lines += ["zzit5b_-ukg_5_20 une souris \u00e9norme", "firstTest_0_10"]
    (root / "AllVideoDescriptions.txt").write_bytes("\r\n".join(lines).encode())


def write_msvdqa(root: Path) -> None:
    """Four training questions on three clips, three test questions on two."""
    write_clips(root)
    asked = {
        "train": [(0, 1, "who eats?", "squirrel"), (1, 1, "what is eaten?", "peanut")],
        "test": [(40, 1301, "who sings?", "man"), (41, 1970, "what eats?", "cat")],
    }
    asked["train"] += [(2, 2, "who walks?", "person"), (3, 1200, "who walks?", "person")]
    asked["test"] += [(42, 1970, "what is it?", "mouse")]
    for split, questions in asked.items():
        content = [
            {"answer": answer, "id": number, "question": text, "video_id": clip}
            for number, clip, text, answer in questions
        ]
        dump(root / f"{split}_qa.json", content)


def sound(seconds: float, rate: int, channels: int, pitch: float) -> NDArray[np.float64]:
    time = np.arange(int(seconds * rate)) / rate
    return 0.5 * np.sin(2 * np.pi * pitch * time)[:, None].repeat(channels, axis=1)


def write_sound(path: Path, number: int, seconds: float = 0.1) -> None:
    """Write a sound whose rate, channels and format follow from its number and name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rate, channels = (8000, 16000, 44100)[number % 3], 1 + number % 2
    soundfile.write(path, sound(seconds, rate, channels, 200 + 10 * number), rate)


def write_rows(path: Path, rows: Iterable[Sequence[object]], encoding: str = "utf-8") -> None:
    buffer = io.StringIO()
    csv.writer(buffer).writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue().encode(encoding))


def write_audiocaps(root: Path) -> None:
    """Eight training clips, one of them a known bad one; four test clips, one with 4 captions."""
    head = ("audiocap_id", "youtube_id", "start_time", "caption")
    train = [(f"9{n}", f"-clip_{n:06d}", 30 * n, f'A "woman" talks {n}, then') for n in range(7)]
    train.append(("99", "2sh7ZkazyO8", 10, "damaged"))
    test = [
        (f"1{clip}{n}", f"test-{clip}", 10, f"caption {n} of {clip}")
        for n in range(5)
        for clip in range(4)
        if (clip, n) != (3, 4)
    ]
    write_rows(root / "dataset" / "train.csv", [head, *train])
    write_rows(root / "dataset" / "test.csv", [head, *test])
    audio = root / "audio"
    names = ["-clip_000000_0.wav", "-clip_000001_30.flac", "92.wav", "Y-clip_000003.wav", "94.flac"]
    for number, name in enumerate(names):
        write_sound(audio / name, number)
    for number, name in enumerate(["test-0_10.wav", "111.wav", "Ytest-2.flac", "test-3_10.wav"]):
        write_sound(audio / "test" / name, 20 + number)
    write_sound(audio / "2sh7ZkazyO8_10.wav", 40)
    write_sound(audio / "-clip_000005_150.wav", 41, seconds=0)


def write_clothoaqa(root: Path) -> None:
    """Two training and one test sound, two questions each, three rows a question; Latin-1."""
    head = ("file_name", "QuestionText", "answer", "confidence")
    names = {"train": ["Bike wheel.wav", "Caf\u00e9 (Z\u00fcrich) #2.wav"], "test": ["rain.wav"]}
    number = 0
    for split, files in names.items():
        rows: list[Sequence[str]] = [head]
        for name in files:
            write_sound(root / "audio_files" / name, number, seconds=0.2)
            number += 1
            for text in ("Is it na\u00efve?", "How many, exactly?"):
                rows += [(name, text, "yes", "yes"), (name, text, "Yes ", "Yes")]
                rows.append((name, text, "no", "maybe" if "many" in text else "yes "))
        write_rows(root / f"clotho_aqa_{split}.csv", rows, "latin-1")


def cloud(number: int) -> NDArray[np.float32]:
    """Return points (POINTS, 6), colours in whole steps to 255."""
    random = np.random.default_rng(number)
    places = random.normal(3, 2, (POINTS, 3))
    return np.hstack([places, random.integers(0, 256, (POINTS, 3))]).astype(np.float32)


def pt_bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def ply_bytes(points: NDArray[np.float32]) -> bytes:
    head = ["ply", "format ascii 1.0", "comment x", f"element vertex {len(points)}"]
    head += [f"property float {axis}" for axis in "xyz"]
    head += [f"property uchar {colour}" for colour in ("red", "green", "blue")]
    head += ["element face 1", "property list uchar int vertex_indices", "end_header"]
    rows = [" ".join([*(f"{v:.6f}" for v in p[:3]), *(str(int(v)) for v in p[3:])]) for p in points]
    return "\n".join([*head, *rows, "3 0 1 2", ""]).encode()


def npy_bytes(points: NDArray[np.float32]) -> bytes:
    buffer = io.BytesIO()
    scaled = points.copy()
    scaled[:, 3:] /= 255
    np.save(buffer, scaled)
    return buffer.getvalue()


def write_points(root: Path) -> None:
    """Objects 0 to 4 as tensors in a zip, 5 to 8 as PLY, the others as PointLLM's arrays."""
    for folder in ("PointCloud_pt_zips", "Cap3D_pcs", "8192_npy"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(root / "PointCloud_pt_zips" / "compressed_pcs_pt_00.zip", "w") as target:
        target.writestr(f"../{UIDS[11]}.pt", pt_bytes(torch.zeros(6, POINTS)))
        target.writestr(f"/{UIDS[11]}.ply", b"")
        for number in range(5):
            tensor = torch.from_numpy(cloud(number).T.copy())
            target.writestr(f"Cap3D_pcs_pt/{UIDS[number]}.pt", pt_bytes(tensor))
    for number in range(5, 9):
        (root / "Cap3D_pcs" / f"{UIDS[number]}.ply").write_bytes(ply_bytes(cloud(number)))
    for number in range(9, 12):
        (root / "8192_npy" / f"{UIDS[number]}_8192.npy").write_bytes(npy_bytes(cloud(number)))


def write_cap3d(root: Path) -> None:
    """Twelve objects without a header, one with a long caption, some with stray quotes."""
    write_points(root)
    lines = [f"{uid},a red chair number {n}" for n, uid in enumerate(UIDS)]
    lines[1] = f'{UIDS[1]},"a table, with ""legs""."'
    lines[2] = f'{UIDS[2]},"a stray quote at the front'
    lines[3] = f'{UIDS[3]},a stray quote at the end"'
    lines[4] = f'{UIDS[4]},"two\nlines"'
    lines[5] = f"{UIDS[5]},{'x' * 101}"
    lines[6] = f"{UIDS[6]},{'y' * 100}"
    lines.append("6760e543e1d645d5aaacd3803bcae524,damaged")
    (root / "Cap3D_automated_Objaverse_full.csv").write_text("\n".join(lines) + "\n")


def write_cap3dqa(root: Path) -> None:
    """Twelve training questions on six objects, four test questions on three (one in both)."""
    write_points(root)
    head = ("", "Unnamed: 0", "sample_id", "caption", "caption_no_color", "question", "answer")
    head += ("extractive", "correct")

    def row(number: int, uid: str, answer: str) -> tuple[object, ...]:
        asked = f"what is {number}, then?"
        return (number, number, uid, f"a thing {uid[-2:]}", "x", asked, answer, True, True)

    train = [row(n, UIDS[n % 6], "a model" if n % 4 == 3 else f"answer {n}") for n in range(12)]
    test = [row(n, UIDS[5 + n % 3], f"test answer {n}") for n in range(4)]
    write_rows(root / "CAP3DQA_final.csv", [head, *train, row(12, "not an id", "a")])
    write_rows(root / "CAP3DQA_final_val.csv", [head, *test])


WRITERS: dict[str, Callable[[Path], None]] = {
    "coco": write_coco,
    "okvqa": write_okvqa,
    "msvd": write_msvd,
    "msvdqa": write_msvdqa,
    "audiocaps": write_audiocaps,
    "clothoaqa": write_clothoaqa,
    "cap3d": write_cap3d,
    "cap3dqa": write_cap3dqa,
}
"""Dataset -> what writes its source."""
