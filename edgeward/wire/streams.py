"""The Stream resource: source -> window -> features -> model slot -> actions -> what to publish."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from edgeward.errors import InvalidDocument
from edgeward.wire.spec import Positive, Seconds, SpecStruct, TopicText

PayloadFormat = Literal["json", "csv", "msgpack", "sparkplug"]
TimeUnit = Literal["s", "ms", "us", "ns", "iso8601"]

# --- sources ----------------------------------------------------------------------------------------


class PayloadSource(SpecStruct, frozen=True):
    """How samples lie in a message. Shared by the sources that receive messages.

    `json` and `msgpack`: one object per message or an array of them. `time`, `key` and `values` are
    paths into a sample (`t`, `$.meta.ts`, `readings[0].value`): the event time in `time_unit` (absent:
    arrival), an optional key that tells several sensors on one topic apart, and the object that holds
    the features (empty: the sample itself). `fields` gives single features a path of their own.
    `csv`: one sample per line; `columns` names them when the message has no header line.
    `sparkplug`: a Sparkplug B payload; metrics are features, the metric's own timestamp the time.

    With `sequence`, each sample also carries `epoch` and `seq` (json and msgpack only); the agent
    acknowledges with `{"epoch", "seq"}` once the rows made from it are durable, and drops repeats.
    """

    format: PayloadFormat = "json"
    time: str = ""
    time_unit: TimeUnit = "s"
    values: str = ""
    key: str = ""
    fields: dict[str, str] = {}
    columns: list[str] = []
    sequence: bool = False


class MqttSource(PayloadSource, frozen=True, kw_only=True):
    """Samples from an MQTT topic. `{site}` and `{device}` in the topic are filled in on the device.

    A `+` stands for any one level, a `#` at the end for the rest: samples without a `key` of their own then
    have the topic they came on as their key. Acks of a numbering sensor go to `{topic}/ack`.
    """

    topic: Annotated[str, Meta(min_length=1, max_length=512, pattern=r"^[^\x00]+$")]


class HttpSource(PayloadSource, frozen=True):
    """Samples posted to the agent at `/v1/streams/{stream}/samples`; the response says what was taken."""


class FilesSource(SpecStruct, frozen=True):
    """Files of a folder in the order of their names: tables (CSV, Parquet) or images.

    `clock` `arrival` replays as fast as the model takes rows, `event` keeps the distances of the event
    times, divided by `speed`. With `follow`, new files are taken as they appear; a file must be moved
    into the folder whole (write elsewhere, then rename). Images become one tensor `[H, W, C]` of uint8
    each, scaled to `width` x `height` when given.
    """

    path: Annotated[str, Meta(min_length=1)]
    pattern: str = "*"
    format: Literal["csv", "parquet", "image"] = "csv"
    time: str = ""
    time_unit: TimeUnit = "s"
    key: str = ""
    clock: Literal["arrival", "event"] = "arrival"
    speed: Annotated[float, Meta(gt=0)] = 1.0
    follow: bool = False
    width: Annotated[int, Meta(ge=0, le=16384)] = 0
    height: Annotated[int, Meta(ge=0, le=16384)] = 0


class CameraSource(SpecStruct, frozen=True):
    """Frames of a camera, an RTSP address or a video file through OpenCV, as `[H, W, C]` uint8 RGB.

    At most `rate` frames per second are taken; the newest counts, older ones are dropped and counted.
    """

    url: Annotated[str, Meta(min_length=1)]
    rate: Annotated[float, Meta(gt=0, le=1000)] = 5.0
    width: Annotated[int, Meta(ge=0, le=16384)] = 0
    height: Annotated[int, Meta(ge=0, le=16384)] = 0


class OpcuaSource(SpecStruct, frozen=True):
    """Node values of an OPC UA server: `nodes` maps a feature to a node id (`ns=2;s=Pump.Flow`).

    One sample per `interval` seconds from the newest values; a value whose status is not Good is missing.
    """

    endpoint: Annotated[str, Meta(pattern=r"^opc\.tcp://")]
    nodes: Annotated[dict[str, str], Meta(min_length=1)]
    interval: Seconds = 1.0


class Register(SpecStruct, frozen=True):
    """One Modbus value: `value = raw * scale + offset`. Multi-register types are big-endian by word unless `swapped`."""

    address: Annotated[int, Meta(ge=0, le=65535)]
    table: Literal["holding", "input", "coil", "discrete"] = "holding"
    type: Literal["int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64"] = "uint16"
    scale: float = 1.0
    offset: float = 0.0
    swapped: bool = False


class ModbusSource(SpecStruct, frozen=True):
    """Registers of a Modbus TCP device, read every `interval` seconds: one sample each time."""

    host: Annotated[str, Meta(min_length=1)]
    registers: Annotated[dict[str, Register], Meta(min_length=1)]
    port: Annotated[int, Meta(ge=1, le=65535)] = 502
    unit: Annotated[int, Meta(ge=0, le=255)] = 1
    interval: Seconds = 1.0


class Source(SpecStruct, frozen=True):
    """Exactly one of them."""

    mqtt: MqttSource | None = None
    http: HttpSource | None = None
    files: FilesSource | None = None
    camera: CameraSource | None = None
    opcua: OpcuaSource | None = None
    modbus: ModbusSource | None = None

    def one(self) -> MqttSource | HttpSource | FilesSource | CameraSource | OpcuaSource | ModbusSource:
        """The source that is set. Raises InvalidDocument when none or several are."""
        given = [value for name in self.__struct_fields__ if (value := getattr(self, name)) is not None]
        if len(given) != 1:
            raise InvalidDocument(
                "expected exactly one source",
                field="spec.source",
                hint=f"one of {', '.join(self.__struct_fields__)}",
            )
        source: MqttSource | HttpSource | FilesSource | CameraSource | OpcuaSource | ModbusSource = given[0]
        return source


# --- quality, windows -------------------------------------------------------------------------------


class Check(SpecStruct, frozen=True):
    """What a feature's reading must fulfil to reach a model; a violation is counted and the sample marked.

    `unit` is compared where the source carries units (Sparkplug `engUnit`, OPC UA EUInformation, JSON
    `{"value", "unit"}`). `stuck_after` equal readings in a row of one key make the sensor stuck.
    """

    minimum: float | None = None
    maximum: float | None = None
    unit: str = ""
    stuck_after: Annotated[int, Meta(ge=2)] | None = None


class Window(SpecStruct, frozen=True):
    """How samples are grouped, per key when `per_key`.

    By count: closes after `count` samples, or `timeout` seconds after its first one arrived. By event
    time: `size` seconds long; closes when the watermark (newest event time minus `lateness`) passes its
    end, or nothing has arrived for `timeout` seconds. `slide` (samples or seconds) below the length
    makes windows overlap; absent, they tumble.

    A sample older than the watermark's windows is late: counted, stored without a prediction, not
    inferred. Within a window samples are ordered by event time.

    `aggregate` `none` infers each sample (one call for all of them); `stack` gives the window's samples
    as one `[count, features]` example; the others infer once on that statistic of each feature.
    """

    count: Annotated[int, Meta(ge=1, le=4096)] = 1
    size: Seconds | None = None
    slide: Annotated[float, Meta(gt=0)] | None = None
    lateness: Annotated[float, Meta(ge=0)] = 0.0
    timeout: Seconds = 1.0
    per_key: bool = False
    aggregate: Literal[
        "none", "mean", "minimum", "maximum", "median", "sum", "deviation", "last", "stack"
    ] = "none"


# --- actions, publishing ----------------------------------------------------------------------------


class Action(SpecStruct, frozen=True):
    """What to do at once, without any network beyond the site. Exactly one of `publish`, `webhook`, `file`.

    `when` is a condition (edgeward.conditions) over the model's outputs and the inputs
    (`score > 0.8 && temperature > 60`);
    `alarm` is the verdict of the package's own decision. It must hold for `windows` windows in a row
    per key; after it ran, it does not run again for `hold` seconds nor, with `once`, before the
    condition was false. `rate` bounds runs per minute; what it suppresses is counted.

    `publish` is a topic on the local broker, `webhook` an http(s) address, `file` a path that gets one
    JSON line per run.
    """

    name: str
    when: Annotated[str, Meta(min_length=1, max_length=1000)] = "alarm"
    windows: Annotated[int, Meta(ge=1, le=10_000)] = 1
    hold: Annotated[float, Meta(ge=0)] = 0.0
    once: bool = False
    rate: Annotated[float, Meta(gt=0)] | None = None
    publish: TopicText | None = None
    webhook: Annotated[str, Meta(pattern=r"^https?://")] | None = None
    file: Annotated[str, Meta(min_length=1)] | None = None


class Publish(SpecStruct, frozen=True):
    """What goes up, besides alarms.

    `results`: `all`; `every` n-th (`every`); `changes` (an output moved by more than `tolerance`, or the
    alarm flipped, per key); `uncertain` (the decision's output lies within `margin` of its threshold);
    `disagreeing` (a candidate that runs without acting was asked too and answered otherwise);
    `none`. Trends go up per `trend_bucket` seconds of event time unless `trends` is off, raw samples only
    if asked: `all`, or those of `disagreeing` examples. Of these at most `disagreeing_rate` examples go up per
    minute; the others are counted.
    """

    results: Literal["all", "every", "changes", "uncertain", "disagreeing", "none"] = "all"
    every: Positive = 10
    tolerance: Annotated[float, Meta(ge=0)] = 0.0
    margin: Annotated[float, Meta(ge=0)] = 0.1
    samples: Literal["all", "disagreeing", "none"] = "none"
    disagreeing_rate: Annotated[float, Meta(gt=0)] = 60.0
    trends: bool = True
    trend_bucket: Seconds = 60.0


class StreamSpec(SpecStruct, frozen=True):
    """`features` name the model's inputs in the model's order; empty for images, which are one tensor."""

    source: Source
    features: list[str] = []
    quality: dict[str, Check] = {}
    slot: str = "default"
    window: Window = Window()
    actions: list[Action] = []
    publish: Publish = Publish()
