import pytest

from hpc import mpi


def rank_and_size(offset):
    comm = mpi.world()
    return comm.rank + offset, comm.size, comm.allreduce(comm.rank)


def fails_on_last_rank():
    comm = mpi.world()
    if comm.rank == comm.size - 1:
        raise ValueError("the last rank gives up")
    comm.barrier()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_see_each_other(mpirun, ranks):
    assert mpirun(ranks, rank_and_size, 10) == [
        (10 + rank, ranks, ranks * (ranks - 1) // 2) for rank in range(ranks)
    ]


def test_a_failing_rank_fails_the_test_and_does_not_hang(mpirun):
    with pytest.raises(pytest.fail.Exception, match="the last rank gives up"):
        mpirun(2, fails_on_last_rank, timeout=60)
    assert len(mpirun(2, rank_and_size, 10)) == 2, "ranks anew"
