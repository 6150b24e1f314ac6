// Threads that go through the same phases together. No include guard: read once per level.
//
// A phase is a number of independent items; nobody leaves it before all its items are done. Every member owns
// an equal range of the items, always the same one, so that what it touched stays in its cache. A member that
// has no item left takes those of members that have not arrived, and after a while of waiting those of
// anybody: whoever is there can finish alone. So a crew is right, and cannot hang, with however few threads
// the pool gives it: none of them ever waits for a thread to *arrive*, only for one that is running an item.
// An item computes the same bits whoever runs it.

struct Crew {
  CrewSeat* seats;    // one per member
  int64_t* finished;  // items done since the beginning, over all phases
  int members, me;
  uint64_t phase_number = 0;
  int64_t target = 0;

  Crew(CrewSeat* seats, int64_t* finished, int members, int me)
      : seats(seats), finished(finished), members(members), me(me) {
    __atomic_store_n(&seats[me].arrived, 1, __ATOMIC_RELAXED);
  }

  template <class Body>
  void phase(int64_t items, const Body& body) {
    ++phase_number;
    target += items;
    int64_t done = take(me, items, body);
    for (int other = 0; other < members; ++other)
      if (!__atomic_load_n(&seats[other].arrived, __ATOMIC_RELAXED)) done += take(other, items, body);
    if (done) __atomic_fetch_add(finished, done, __ATOMIC_ACQ_REL);
    for (int spins = 1; __atomic_load_n(finished, __ATOMIC_ACQUIRE) < target; ++spins) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
      if (spins % 128 != 0) continue;
      done = 0;
      for (int other = 0; other < members; ++other) done += take(other, items, body);
      if (done) __atomic_fetch_add(finished, done, __ATOMIC_ACQ_REL);
      sched_yield();
    }
  }

 private:
  // Runs what is left of a member's range. Its seat holds the phase and how many of the range are taken, in
  // one word.
  template <class Body>
  int64_t take(int member, int64_t items, const Body& body) {
    const int64_t begin = member * items / members;
    const uint64_t size = (member + 1) * items / members - begin;
    int64_t done = 0;
    uint64_t word = __atomic_load_n(&seats[member].word, __ATOMIC_ACQUIRE);
    for (;;) {
      const uint64_t taken = word >> 32 == phase_number ? word & 0xffffffffu : 0;
      if (word >> 32 > phase_number || taken >= size) return done;
      const uint64_t claim = phase_number << 32 | (taken + 1);
      if (!__atomic_compare_exchange_n(&seats[member].word, &word, claim, false, __ATOMIC_ACQ_REL,
                                       __ATOMIC_ACQUIRE))
        continue;
      word = claim;
      body(begin + static_cast<int64_t>(taken));
      ++done;
    }
  }
};

// A crew of one, for work that a single thread owns.
struct Alone {
  template <class Body>
  void phase(int64_t items, const Body& body) {
    for (int64_t item = 0; item < items; ++item) body(item);
  }
};
