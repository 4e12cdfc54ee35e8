"""What DeepCAD's and Fusion 360's documents share: profiles, planes, boxes, and which profile an extrusion uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from cadtrain.cad.formats.loops import read_loop
from cadtrain.cad.formats.node import Faults, Node
from cadtrain.cad.sequence import BoundingBox, Extent, Operation, Profile, SketchExtrude, SketchPlane, Vector3

OPERATIONS = {
    "NewBodyFeatureOperation": Operation.NEW,
    "JoinFeatureOperation": Operation.JOIN,
    "CutFeatureOperation": Operation.CUT,
    "IntersectFeatureOperation": Operation.INTERSECT,
}
EXTENTS = {
    "OneSideFeatureExtentType": Extent.ONE_SIDE,
    "SymmetricFeatureExtentType": Extent.SYMMETRIC,
    "TwoSidesFeatureExtentType": Extent.TWO_SIDES,
}
_KINDS = {"Sketch": "sketch", "ExtrudeFeature": "extrude"}
_AXIS_TOLERANCE = 1e-4


ReadExtrude = Callable[[Node, Node, Faults], Iterator[SketchExtrude]]
"""Takes an extrusion, the document's entities and where to put faults; gives a step for each profile."""


def read_steps(root: Node, order: str, read_extrude: ReadExtrude) -> tuple[SketchExtrude, ...]:
    """The document's steps, in its unit; `order` names the list that holds the order of their making.

    Raises `SchemaError` with all faults of the document, or where no extrusion makes anything.
    """
    steps: list[SketchExtrude] = []
    faults = Faults()
    for feature in _extrude_features(root, order, faults):
        with faults.caught():
            steps.extend(read_extrude(feature, root.child("entities"), faults))
    faults.raise_any()
    if not steps:
        raise root.child(order).error("no extrusion makes anything, so there is no part")
    return tuple(steps)


def _extrude_features(root: Node, order: str, faults: Faults) -> Iterator[Node]:
    """The document's extrusions in the order of their making: that of the list `order`, whose `index` only repeats it.

    Sketches that the list leaves out are passed over, but every entity must say what it is.
    """
    entities = root.child("entities")
    names = list(entities.mapping())
    items: tuple[Node, ...] = ()
    with faults.caught():
        items = tuple(root.child(order).items())
    for name in names:
        with faults.caught():
            entities.child(name).child("type").choice(_KINDS)
    for item in items:
        with faults.caught():
            name = item.child("entity").text()
            entity = entities.child(name, f"the {order} names entity {name!r}, which is not among the entities")
            if entity.child("type").choice(_KINDS) == "extrude":
                yield entity


def feature_operation(feature: Node, num_profiles: int) -> tuple[Operation, Operation]:
    """The operation of an extrusion's first profile, and that of each further one.

    A new body's further profiles join it; joins and cuts repeat, which comes to the same as doing them at once. An
    intersection with several profiles cannot be said that way and is refused.
    """
    operation = feature.child("operation").choice(OPERATIONS)
    if operation is Operation.INTERSECT and num_profiles > 1:
        raise feature.child("profiles").error(
            f"an intersection with {num_profiles} profiles at once cannot be said as steps of one profile"
        )
    return operation, Operation.JOIN if operation is Operation.NEW else operation


def used_profile(use: Node, entities: Node) -> tuple[Node, Node]:
    """The sketch and the profile that an entry of an extrusion's `profiles` names."""
    sketch_name, profile_name = use.child("sketch").text(), use.child("profile").text()
    sketch = entities.child(sketch_name, f"an extrusion uses sketch {sketch_name!r}, which is not among the entities")
    sketch.child("type").choice({"Sketch": None})
    return sketch, sketch.child("profiles").child(
        profile_name, f"sketch {sketch_name!r} has no profile {profile_name!r}"
    )


def read_distance(extent: Node) -> float:
    """The distance of `extent_one` or `extent_two`; a taper is refused."""
    if extent.has("taper_angle") and (taper := extent.child("taper_angle").child("value")).number() != 0:
        raise taper.error(f"a tapered extrusion ({taper.number():g} rad) is not supported")
    return extent.child("distance").child("value").number()


def read_box(root: Node) -> BoundingBox | None:
    """The box of the finished solid, where the document states it."""
    if not root.has("properties") or not root.child("properties").has("bounding_box"):
        return None
    box = root.child("properties").child("bounding_box")
    return BoundingBox(vector(box.child("min_point")), vector(box.child("max_point")))


def read_profile(profile: Node, *, arcs_follow_normal: bool = False) -> Profile:
    """The profile; the loop with the largest area is the outer one."""
    nodes = list(profile.child("loops").items())
    if not nodes:
        raise profile.child("loops").error("a profile has no loops")
    loops = [read_loop(node, arcs_follow_normal=arcs_follow_normal) for node in nodes]
    outer = max(loops, key=lambda loop: abs(loop.signed_area))
    return Profile(outer, tuple(loop for loop in loops if loop is not outer))


def read_plane(transform: Node) -> SketchPlane:
    """The sketch plane; its axes must be a right-handed orthonormal frame."""
    origin = vector(transform.child("origin"))
    x, y, z = (vector(transform.child(name)) for name in ("x_axis", "y_axis", "z_axis"))
    products = [_dot(x, x) - 1, _dot(y, y) - 1, _dot(z, z) - 1, _dot(x, y), _dot(x, z), _dot(y, z)]
    if max(map(abs, products)) > _AXIS_TOLERANCE:
        raise transform.error(f"the axes {x}, {y}, {z} are not orthonormal")
    right = x[1] * y[2] - x[2] * y[1], x[2] * y[0] - x[0] * y[2], x[0] * y[1] - x[1] * y[0]
    if _dot(right, z) < 0:
        raise transform.error(f"the axes {x}, {y}, {z} are left-handed")
    return SketchPlane(origin, x, y, z)


def _dot(a: Vector3, b: Vector3) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def vector(node: Node) -> Vector3:
    """An object of x, y and z."""
    return node.child("x").number(), node.child("y").number(), node.child("z").number()
