"""W3, one supervised step: this project beside its peers.

    python benchmarks/train_step.py --torch-python=venv-trl/bin/python --tunix-python=...
    python benchmarks/train_step.py --documents=4 ...        four documents packed into each row
    python benchmarks/train_step.py --side=r4b_jax --remat=full            one side alone

The last line is JSON. CPU seconds of one thread each; `peers/README.md` makes the environments.
"""

import json

import compare
import measure


def main():
    p = compare.parser(__doc__, work=measure.ROWS)
    p.add_argument("--remat", default="matmuls", help="with --side: as model.remat")
    p.set_defaults(repeats=3)
    args = p.parse_args()
    measure.document_length(args)  # or it ends here
    if args.side:
        measure.one_core()
        import work

        print(json.dumps(compare.timed(work.train_step(args), args.repeats)))
        return
    own = compare.ours("train_step.py", "r4b_jax", args)
    sides = {"r4b_jax": own, "r4b_jax, layers recomputed": [*own, "--remat=full"]}
    again = f"--repeats={args.repeats}"
    if args.torch_python:
        sides["transformers"] = compare.peer(args.torch_python, "hf_train.py", args, again)
    if args.tunix_python and args.model == "m2":
        sides["tunix"] = compare.peer(args.tunix_python, "tunix_train.py", args, again)
    compare.show(compare.compare(sides, args.rounds), "W3", args)


if __name__ == "__main__":
    main()
