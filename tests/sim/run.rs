//! One seed from beginning to end: some seconds of trouble, then calm, in which everything must come together.

use std::panic::{AssertUnwindSafe, catch_unwind};

use istiod::raft::wire::ConfChangeV2;

use crate::ledger::{Broken, Check};
use crate::mistake::Mistake;
use crate::plan::Plan;
use crate::world::World;

/// How long the members may take to come together when nothing goes wrong any more, in simulated microseconds.
const CALM_US: u64 = 60_000_000;

/// How long proxies may then take to hold what the mesh says.
const PROXIES_US: u64 = 5_000_000;

/// What a run came to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) steps: u64,
    pub(crate) commits: usize,
    pub(crate) terms: usize,
    pub(crate) lives: u64,
    pub(crate) operations: usize,
    pub(crate) members: usize,
    pub(crate) fingerprint: u64,
}

impl Tally {
    /// The sum over several runs.
    pub(crate) fn add(&mut self, other: &Self) {
        self.steps += other.steps;
        self.commits += other.commits;
        self.terms += other.terms;
        self.lives += other.lives;
        self.operations += other.operations;
        self.members += other.members;
        self.fingerprint ^= other.fingerprint;
    }
}

/// Runs a seed.
///
/// # Errors
///
/// The first invariant that did not hold; a panic of the code under test is one, too.
pub(crate) fn run(seed: u64, mistake: Option<Mistake>) -> Result<Tally, Broken> {
    guarded(|| {
        let mut world = World::new(Plan::new(seed, mistake), false)?;
        whole(&mut world)?;
        Ok(world.tally())
    })
}

/// Runs a seed as for a mistake, but without making it.
///
/// # Errors
///
/// As [`run`]: then it is not the mistake that is found.
pub(crate) fn control(seed: u64, mistake: Mistake) -> Result<Tally, Broken> {
    guarded(|| {
        let mut plan = Plan::new(seed, Some(mistake));
        plan.mistake = None;
        let mut world = World::new(plan, false)?;
        whole(&mut world)?;
        Ok(world.tally())
    })
}

/// Runs a seed that fails once more, and gives the last lines of what happened before it did.
pub(crate) fn trace(seed: u64, mistake: Option<Mistake>, lines: usize) -> Vec<String> {
    let mut world = match World::new(Plan::new(seed, mistake), true) {
        Ok(world) => world,
        Err(broken) => return vec![broken.to_string()],
    };
    let mut end =
        guarded(|| whole(&mut world)).map_or_else(|broken| vec![broken.to_string()], |()| Vec::new());
    let mut all = world.trace.take().unwrap_or_default();
    let mut shown = all.split_off(all.len().saturating_sub(lines));
    shown.append(&mut end);
    shown
}

fn guarded<T>(run: impl FnOnce() -> Result<T, Broken>) -> Result<T, Broken> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
        Err(Broken::new("nothing panics", text))
    })
}

fn whole(world: &mut World) -> Check {
    world.run_until(world.plan.chaos_us)?;
    world.calm_down()?;
    world.come_together()?;
    world.run_until(world.now + PROXIES_US)?;
    world.proxies_agree()?;
    world.history.check().map_err(|seen| Broken::new("linearizability", seen))
}

impl World {
    /// Nothing goes wrong from now on, and what is broken is mended.
    fn calm_down(&mut self) -> Check {
        self.calm = true;
        self.network.heal();
        self.note(|| "calm".to_owned());
        for member in self.members.values_mut() {
            member.tick_percent = 100;
            member.power.set_sync_us(0);
            member.leave_free(u64::MAX);
            if !member.power.is_out() {
                member.power.restore();
            }
        }
        let down: Vec<u64> = self.members.keys().copied().filter(|id| !self.running().contains(id)).collect();
        for id in down {
            self.start(id)?;
        }
        Ok(())
    }

    /// Everybody comes to the same state, with a leader, and with no change of members half done.
    fn come_together(&mut self) -> Check {
        let end = self.now + CALM_US;
        while self.now < end {
            self.run_until(self.now + 250_000)?;
            if let Some(leader) = self.leader().filter(|_| self.together()) {
                let (_, members) = self.ledger.members();
                if members.voters_outgoing.is_empty() {
                    // A proxy of a removed member learns nothing new until that member is told and ends.
                    self.retire_removed();
                    return self.compare();
                }
                if !members.auto_leave {
                    self.propose_members(leader, ConfChangeV2::default())?;
                }
            }
            self.retire_removed();
        }
        let mut seen = vec![format!("members {:?}", self.ledger.members())];
        for member in self.members.values().filter(|member| !member.retired) {
            let status = member.running.as_ref().map(|running| running.driver.status());
            seen.push(format!("{}: {status:?}", member.id));
        }
        Err(Broken::new("the members come together when all is well", seen.join("\n  ")))
    }

    /// Everybody who belongs to the cluster has applied all that is committed.
    fn together(&self) -> bool {
        let until = self.ledger.committed();
        let mut listed = self.members.values().filter(|member| self.listed(member.id));
        listed.all(|member| {
            member.running.as_ref().is_some_and(|running| {
                let status = running.driver.status();
                status.applied == until && status.last_index == until
            })
        })
    }

    fn compare(&mut self) -> Check {
        let listed: Vec<u64> = self.members.keys().copied().filter(|id| self.listed(*id)).collect();
        for id in listed {
            let Some(running) = self.members.get(&id).and_then(|member| member.running.as_ref()) else {
                continue;
            };
            running.machine.encode().map_err(|halt| Broken::new("states encode", halt.to_string()))?;
            for fact in running.journal.take() {
                self.ledger.take(id, fact)?;
            }
        }
        Ok(())
    }

    fn tally(&self) -> Tally {
        Tally {
            steps: self.steps,
            commits: self.ledger.commits(),
            terms: self.ledger.terms_led(),
            lives: self.members.values().map(|member| member.life).sum(),
            operations: self.history.answered(),
            members: self.members.len(),
            fingerprint: self.fingerprint,
        }
    }
}
