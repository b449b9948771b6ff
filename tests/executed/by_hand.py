"""PTX written by hand, and a way to run it."""

import numpy as np

import numflash


def module(
    body: str, parameters: str = ".param .u64 x, .param .u32 n", declares="", cluster=1
) -> str:
    """A module with one entry `kernel`, whose registers are p, r, f, h and rd, 16 of each."""
    directive = "" if cluster == 1 else f".reqnctapercluster {cluster}"
    return f"""
.version 8.0
.target sm_90a
.address_size 64
{declares}
.visible .entry kernel({parameters}) {directive}
{{
    .reg .pred %p<16>; .reg .b32 %r<16>; .reg .f32 %f<16>; .reg .b16 %h<16>; .reg .b64 %rd<16>;
    ld.param.u64 %rd1, [x];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd3, %rd1, %rd2;
{body}
    ret;
}}
"""


def run(body, *, grid=1, block=32, x=None, n=0, declares="", cluster=1, **options):
    x = np.zeros(64, np.uint32) if x is None else x
    ptx = module(body, declares=declares, cluster=cluster)
    found = numflash.run_ptx(ptx, "kernel", grid, block, [x, n], **options)
    return found if options.get("profile") else x


AXPY = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry axpy(.param .u64 x, .param .u64 y, .param .f32 a, .param .u32 n)
{
    .reg .pred %p<2>; .reg .b32 %r<6>; .reg .f32 %f<5>; .reg .b64 %rd<6>;
    ld.param.u64 %rd1, [x];
    ld.param.u64 %rd2, [y];
    ld.param.f32 %f1, [a];
    ld.param.u32 %r1, [n];
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %ntid.x;
    mov.u32 %r4, %tid.x;
    mad.lo.s32 %r5, %r2, %r3, %r4;
    setp.ge.s32 %p1, %r5, %r1;
    @%p1 bra DONE;
    mul.wide.s32 %rd3, %r5, 4;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
    ld.global.f32 %f2, [%rd4];
    ld.global.f32 %f3, [%rd5];
    fma.rn.f32 %f4, %f1, %f2, %f3;
    st.global.f32 [%rd5], %f4;
DONE:
    ret;
}
"""
