"""When warps of a warpgroup, and when warpgroups, wait for each other."""

from functools import cache

from numflash.ptx import Shared, bar_arrive, bar_sync, device_function, f32, instruction, u32

_FIRST_TURN, _FIRST_MEETING = 1, 4
_WARPGROUP, _TWO_WARPGROUPS = 128, 256


@device_function
def meet(group):
    """The warps of a warpgroup wait for each other. Named barriers 4 and up are for this.

    Needed before one thread gives back, for all, a buffer of which they have seen no product: a
    warp that still waited for it would miss the phase of its mbarrier.
    """
    bar_sync(_FIRST_MEETING + group, _WARPGROUP)


@cache
def make_turns(num_groups):
    """(take_turn(group), pass_turn(group), give_first_turn(group)) of warpgroups that alternate.

    Between the first two a warpgroup issues its products, while another computes its softmax;
    `give_first_turn` stands before all. With one warpgroup they do nothing. Named barriers 1 and
    up, one a warpgroup, are theirs.
    """
    alternate, last = num_groups > 1, num_groups - 1

    @device_function
    def take_turn(group):
        if alternate:
            bar_sync(_FIRST_TURN + group, _TWO_WARPGROUPS)

    @device_function
    def pass_turn(group):
        if alternate:
            following = 0 if group == last else group + 1
            bar_arrive(_FIRST_TURN + following, _TWO_WARPGROUPS)

    @device_function
    def give_first_turn(group):
        if alternate and group == last:
            bar_arrive(_FIRST_TURN, _TWO_WARPGROUPS)

    return take_turn, pass_turn, give_first_turn


@instruction(
    "{ .reg .pred ordered; .reg .f32 sum; add.f32 sum, <x>, <y>; "
    "setp.geu.f32 ordered, sum, 0f00000000; @ordered bra on<uid>; "
    "st.shared.f32 [<smem>], sum; bar.sync 15, 128; on<uid>: }",
    sm=90,
)
def softmax_before_wait(smem: Shared(u32, "offset"), offset: u32, x: f32, y: f32):
    """Nothing, but a branch that is never taken and that the assembler cannot see through.

    x and y are sums of probabilities, which are not negative. Without it the assembler moves the
    wait for the tensor cores, which follows, above the softmax that shall run beside them.
    """
