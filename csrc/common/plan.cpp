#include "common/plan.h"

namespace kvspn {
namespace {

class Maker {
  public:
    Maker(const Architecture& architecture, std::vector<Stage>& stages, bool draft)
        : architecture_(architecture), stages_(stages), draft_(draft) {}

    Stage& add(Kind kind, const char* name) {
        Stage stage;
        stage.kind = kind, stage.name = name, stage.draft = draft_;
        stages_.push_back(stage);
        return stages_.back();
    }

    Stage& linear(const char* name, const Norm* norm, Place from, const Matrix& matrix, Place to) {
        Stage& stage = add(Kind::linear, name);
        stage.norm = norm, stage.from = from, stage.matrix = &matrix, stage.to = to;
        stage.accumulate = to == Place::residual;
        return stage;
    }

    void attend(const char* name, int layer, int layers, int query_heads, bool causal, bool cross) {
        Stage& stage = add(Kind::attend, name);
        stage.from = Place::wide, stage.to = Place::attended;
        stage.layer = layer, stage.layers = layers, stage.query_heads = query_heads;
        stage.causal = causal, stage.cross = cross;
    }

    void feed_forward(const char* up, const char* down, const Norm& norm, const Matrix& fc1,
                      const Matrix& fc2) {
        linear(up, &norm, Place::residual, fc1, Place::inner).activation = architecture_.activation();
        linear(down, nullptr, Place::inner, fc2, Place::residual);
    }

    void verify(const char* name, const Norm& norm, const Matrix& head) {
        linear(name, &norm, Place::residual, head, Place::none).kind = Kind::verify;
    }

  private:
    const Architecture& architecture_;
    std::vector<Stage>& stages_;
    bool draft_;
};

void add_draft_network(const Weights& w, std::vector<Stage>& stages) {
    const Architecture& a = w.architecture;
    Maker make(a, stages, true);
    make.add(Kind::embed, "draft.embed").to = Place::residual;
    const int size = a.layers / a.groups;
    for (int i = 0; i < a.blocks; ++i) {
        const Block& block = w.blocks[i];
        const int end = (i * a.groups / a.blocks + 1) * size, count = a.last_layer_only ? 1 : size;
        make.linear("draft.kv_q", &block.kv_norm, Place::residual, block.kv_q, Place::wide);
        make.attend("draft.kv_attention", end - count, count, block.kv_q.outputs / w.head_dim, false, false);
        make.linear("draft.kv_out", nullptr, Place::attended, block.kv_out, Place::residual);
        if (block.cross) {
            make.linear("draft.cross_q", &block.cross_norm, Place::residual, block.cross_q, Place::wide);
            make.attend("draft.cross_attention", end - 1, 1, block.cross_q.outputs / w.head_dim, false, true);
            make.linear("draft.cross_out", nullptr, Place::attended, block.cross_out, Place::residual);
        }
        make.feed_forward("draft.fc1", "draft.fc2", block.ffn_norm, block.fc1, block.fc2);
    }
    make.verify("draft.head", w.draft_norm, w.draft_head);
}

void add_base_model(const Weights& w, std::vector<Stage>& stages) {
    const Architecture& a = w.architecture;
    Maker make(a, stages, false);
    make.add(Kind::embed, "embed").to = Place::residual;
    for (int i = 0; i < a.layers; ++i) {
        const Layer& layer = w.layers[i];
        Stage& qkv = make.linear("self_qkv", &layer.self_norm, Place::residual, layer.self_qkv, Place::wide);
        qkv.layer = i, qkv.keys = true;
        make.attend("self_attention", i, 1, a.heads, true, false);
        make.linear("self_out", nullptr, Place::attended, layer.self_out, Place::residual);
        if (a.cross) {
            Stage& cross_q =
                make.linear("cross_q", &layer.cross_norm, Place::residual, layer.cross_q, Place::wide);
            cross_q.layer = i, cross_q.queries = true;
            make.attend("cross_attention", i, 1, a.heads, false, true);
            make.linear("cross_out", nullptr, Place::attended, layer.cross_out, Place::residual);
        }
        make.feed_forward("fc1", "fc2", layer.ffn_norm, layer.fc1, layer.fc2);
    }
}

}  // namespace

Plan::Plan(const Weights& weights) {
    const Architecture& a = weights.architecture;
    if (a.blocks) add_draft_network(weights, stages);
    base = int(stages.size());
    add_base_model(weights, stages);
    judge = int(stages.size());
    Maker make(a, stages, false);
    make.verify("head", weights.norm, weights.head);
    make.add(Kind::accept, "accept");
    Maker states(a, encode, false);
    for (int i = 0; a.cross && i < a.layers; ++i) {
        const Matrix& matrix = weights.layers[i].cross_kv;
        Stage& stage = states.linear("cross_kv", nullptr, Place::states, matrix, Place::cross);
        stage.layer = i, stage.keys = true;
    }
}

}  // namespace kvspn
