// The namespace of the operators in torch's dispatcher. tools/kernels_layout.py builds with another, so that such a build and
// the package share a process; Python has the same name in linearpatch_kernels/_ops.py.
#pragma once

#ifndef LINEARPATCH_NAMESPACE
#define LINEARPATCH_NAMESPACE linearpatch
#endif

#define LINEARPATCH_QUOTED(name) #name
#define LINEARPATCH_JOINED(space, name) LINEARPATCH_QUOTED(space) "::" name

// The whole name of an operator of ours, as a literal.
#define LINEARPATCH_OPERATOR(name) LINEARPATCH_JOINED(LINEARPATCH_NAMESPACE, name)
