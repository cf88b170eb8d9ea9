// What Python calls: a C interface, so that this compiles in seconds, without headers of torch. gruqat_hf/scan/cpu/library.py
// mirrors the structs.

#include "training.h"

// Multiplications that a team of threads, which takes some microseconds to call, is worth calling for.
static const double worth = 1 << 20;

extern "C" {

int32_t gruqat_version() { return 1; }

// How weights are to be packed: elements to a step, bytes to an integer weight; and the sizes of the structs.
void gruqat_layout(int32_t* layout) {
    const size_t sizes[] = {PACK, sizeof(Weight), sizeof(Layer), sizeof(Call), sizeof(Adjoint), sizeof(BackwardCall)};
    for (int i = 0; i < 6; i++) layout[i] = int32_t(sizes[i]);
}

void gruqat_use_team(void* run, void* member, void* size) {
    team = {(void (*)(void (*)(void*), void*, unsigned, unsigned))run, (int (*)())member, (int (*)())size};
}

// y = tanh(x) or sigmoid(x), for the check that this build computes the portable gates.
void gruqat_gate(int32_t sigmoid, const float* x, float* y, int64_t count) {
    for (int64_t i = 0; i + LANES <= count; i += LANES)
        store(y + i, sigmoid ? portable_sigmoid(load(x + i)) : portable_tanh(load(x + i)));
}

void gruqat_infer(const Layer* layer, const Call* call) {
    const int batch = int(call->batch);
    if (batch == 0) return;
    const double recurrent = operand_work(layer->recurrent) + 30.0 * layer->hidden;
    const double input = call->x ? operand_work(layer->input) * (layer->input.first.integer ? 1.0 : 4.0) : 0.0;
    int threads = call->threads;
    const bool together = call->x && (batch < threads || shares_step(*layer));
    if (!together) {
        if ((recurrent + input) * batch * call->steps < worth) threads = 1;
        const int parts = std::min(batch, threads);
        parallel(parts, threads, [&](int part) {
            const int first = batch * part / parts, last = batch * (part + 1) / parts;
            if (call->x) {
                walk_rows(*layer, *call, first, last);
            } else {
                walk_products(*layer, *call, first, last);
            }
        });
    } else if (threads == 1 || input * batch * std::min<int64_t>(call->steps, 128 / batch + 1) < worth) {
        walk_rows(*layer, *call, 0, batch);
    } else {
        walk_together(*layer, *call);
    }
}

void gruqat_backward(const Layer* layer, const Adjoint* adjoint, const BackwardCall* call) {
    const int batch = int(call->batch);
    if (batch == 0) return;
    const double work = (operand_work(layer->recurrent) + 30.0 * layer->hidden) * batch * call->steps;
    const int threads = work < worth ? 1 : call->threads, parts = std::min(batch, threads);
    parallel(parts, threads, [&](int part) {
        walk_back(*layer, *adjoint, *call, batch * part / parts, batch * (part + 1) / parts);
    });
}
}
