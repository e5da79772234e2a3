//! What goes wrong, and what operators do meanwhile.

use istiod::raft::node::Event;
use istiod::raft::wire::{ConfChangeSingle, ConfChangeTransition, ConfChangeType, ConfChangeV2};

use crate::ledger::Check;
use crate::member::{Member, Waiter};
use crate::world::{Happening, World};

impl World {
    /// The next thing that goes wrong.
    pub(crate) fn fault(&mut self) -> Check {
        if self.calm {
            return Ok(());
        }
        let pause = 1 + self.rng.u64(0..self.plan.fault_each_us * 2);
        self.after(pause, Happening::Fault);
        match self.draw_fault() {
            Some(0) => self.crash_one(),
            Some(1) => self.arm_one(),
            Some(2) => self.restart_one(),
            Some(3) => self.part(),
            Some(4) => self.mend(),
            Some(5) => self.change_weather(),
            Some(6) => self.change_disk(),
            Some(7) => self.change_clock(),
            Some(8) => self.transfer(),
            Some(9) => self.change_members(),
            Some(10) => self.sync_store(),
            Some(11) => self.change_space(),
            Some(_) | None => Ok(()),
        }
    }

    fn draw_fault(&mut self) -> Option<usize> {
        let weights = self.plan.weights.all();
        let mut at = self.rng.u32(0..weights.iter().sum::<u32>().max(1));
        weights.iter().position(|weight| {
            let here = at < *weight;
            at = at.saturating_sub(*weight);
            here
        })
    }

    fn any_running(&mut self) -> Option<u64> {
        let running = self.running();
        self.rng.choice(running)
    }

    /// Somebody, and as often as not the leader.
    fn somebody(&mut self) -> Option<u64> {
        if self.rng.bool() { self.leader().or_else(|| self.any_running()) } else { self.any_running() }
    }

    fn crash_one(&mut self) -> Check {
        let Some(id) = self.somebody() else { return Ok(()) };
        self.note(|| format!("member {id} crashes"));
        self.crash(id)
    }

    /// The member ends at one of the next points at which it can.
    fn arm_one(&mut self) -> Check {
        let Some(id) = self.somebody() else { return Ok(()) };
        let (draws, last_write) = (self.rng.u64(0..24), self.rng.u8(..));
        if let Some(member) = self.members.get(&id) {
            member.power.cut_after(draws, last_write);
        }
        self.note(|| format!("member {id} will end after {draws} writes, syncs and messages"));
        Ok(())
    }

    fn restart_one(&mut self) -> Check {
        let Some(id) = self.somebody() else { return Ok(()) };
        let Some(member) = self.members.get_mut(&id) else { return Ok(()) };
        let waiting = member.running.as_mut().map(|running| std::mem::take(&mut running.waiting));
        member.stop_politely()?;
        self.note(|| format!("member {id} is restarted"));
        self.gone(waiting.unwrap_or_default());
        self.after(10_000, Happening::Start(id));
        Ok(())
    }

    /// Two sides that do not hear each other, or one direction that is dead, or a member alone.
    fn part(&mut self) -> Check {
        let ids: Vec<u64> = self.members.keys().copied().collect();
        let side: Vec<u64> = match self.rng.u32(0..3) {
            0 => self.leader().into_iter().collect(),
            1 => self.rng.choice(ids.clone()).into_iter().collect(),
            _ => ids.iter().copied().filter(|_| self.rng.bool()).collect(),
        };
        let one_way = self.rng.u32(0..3) == 0;
        let outwards = self.rng.bool();
        for here in &side {
            for there in ids.iter().filter(|id| !side.contains(id)) {
                if !one_way || outwards {
                    self.network.cut(*here, *there);
                }
                if !one_way || !outwards {
                    self.network.cut(*there, *here);
                }
            }
        }
        self.note(|| format!("{side:?} is cut off{}", if one_way { " one way" } else { "" }));
        Ok(())
    }

    fn mend(&mut self) -> Check {
        self.network.mend();
        self.note(|| "the network is whole".to_owned());
        Ok(())
    }

    fn change_weather(&mut self) -> Check {
        let network = &mut self.network;
        (network.loss, network.twice, network.late) = match self.rng.u32(0..5) {
            0 => (0, 0, 0),
            1 => (self.rng.u64(10..300), 0, 0),
            2 => (0, self.rng.u64(10..500), self.rng.u64(10..300)),
            3 => (self.rng.u64(300..900), 0, 0),
            _ => (self.rng.u64(0..100), self.rng.u64(0..100), self.rng.u64(0..100)),
        };
        network.delay_us = if self.rng.u32(0..3) == 0 { (10_000, 200_000) } else { (200, 5_000) };
        let (loss, late) = (network.loss, network.late);
        self.note(|| format!("the network loses {loss} and delays {late} of a thousand"));
        Ok(())
    }

    fn change_disk(&mut self) -> Check {
        let Some(id) = self.somebody() else { return Ok(()) };
        let sync_us =
            if self.rng.u32(0..3) == 0 { self.rng.u64(20_000..600_000) } else { self.rng.u64(0..5_000) };
        if let Some(member) = self.members.get(&id) {
            member.power.set_sync_us(sync_us);
        }
        self.note(|| format!("a sync of member {id} takes {sync_us} us"));
        Ok(())
    }

    fn change_space(&mut self) -> Check {
        let Some(id) = self.somebody() else { return Ok(()) };
        let full = self.rng.bool();
        // One at a time: where nobody writes, nothing is found.
        for (each, member) in &self.members {
            member.leave_free(if full && *each == id { 0 } else { u64::MAX });
        }
        self.note(|| {
            format!("the disk of member {id} {}", if full { "is nearly full" } else { "has space" })
        });
        Ok(())
    }

    fn change_clock(&mut self) -> Check {
        let Some(id) = self.somebody() else { return Ok(()) };
        let (now, kind) = (self.now, self.rng.u32(0..4));
        let (jump, percent, pause) =
            (self.rng.u64(0..10_000_000), self.rng.u64(40..250), self.rng.u64(100_000..3_000_000));
        let Some(member) = self.members.get_mut(&id) else { return Ok(()) };
        let life = member.life;
        match kind {
            0 => member.ahead_us += jump,
            1 => member.tick_percent = percent,
            2 => member.tick_percent = 100,
            _ => {
                // It stands still, as under SIGSTOP.
                if let Some(running) = &mut member.running {
                    running.busy_until = running.busy_until.max(now + pause);
                    if !std::mem::replace(&mut running.wakes, true) {
                        self.after(pause, Happening::Wake(id, life));
                    }
                }
            }
        }
        self.note(|| format!("the clock of member {id}: kind {kind}"));
        Ok(())
    }

    fn transfer(&mut self) -> Check {
        let (Some(from), Some(to)) = (self.leader(), self.any_running()) else { return Ok(()) };
        let life = self.members.get(&from).map_or(0, |member| member.life);
        self.note(|| format!("member {from} hands over to {to}"));
        self.tell(from, life, Event::Transfer(to))
    }

    fn sync_store(&mut self) -> Check {
        let Some(id) = self.any_running() else { return Ok(()) };
        self.members.get_mut(&id).map_or(Ok(()), Member::sync_store)
    }

    fn change_members(&mut self) -> Check {
        self.retire_removed();
        let Some(leader) = self.leader() else { return Ok(()) };
        let (_, members) = self.ledger.members().clone();
        let joint = !members.voters_outgoing.is_empty();
        let transition = match self.rng.u32(0..3) {
            0 => ConfChangeTransition::Auto,
            1 => ConfChangeTransition::Implicit,
            _ => ConfChangeTransition::Explicit,
        };
        let mut changes = Vec::new();
        if !joint {
            self.draw_changes(&members.voters, &members.learners, &mut changes)?;
        }
        if changes.is_empty() && !joint {
            return Ok(());
        }
        let change = ConfChangeV2 { transition: transition.into(), changes, context: Vec::new().into() };
        self.note(|| {
            format!("member {leader} is to change the members: {:?} {transition:?}", change.changes)
        });
        self.propose_members(leader, change)
    }

    /// Asks a member to change the members.
    pub(crate) fn propose_members(&mut self, leader: u64, change: ConfChangeV2) -> Check {
        let Some((life, sequence)) = self.number(leader, Waiter::Operator) else { return Ok(()) };
        self.tell(leader, life, Event::ChangeMembers { sequence, change })
    }

    /// Between two and five voters: one or two come, one or two go, and sometimes as learners first.
    fn draw_changes(
        &mut self,
        voters: &[u64],
        learners: &[u64],
        changes: &mut Vec<ConfChangeSingle>,
    ) -> Check {
        let mut change = |kind: ConfChangeType, node_id: u64| {
            changes.push(ConfChangeSingle { change_type: kind.into(), node_id });
        };
        let (mut count, most) = (voters.len(), self.rng.u32(1..=3));
        for _ in 0..most {
            match self.rng.u32(0..5) {
                0 if self.last_id < 12 => change(ConfChangeType::AddLearnerNode, self.join()?),
                1 if self.last_id < 12 && count < 5 => {
                    count += 1;
                    change(ConfChangeType::AddNode, self.join()?);
                }
                2 if count < 5 => {
                    if let Some(id) = self.rng.choice(learners) {
                        count += 1;
                        change(ConfChangeType::AddNode, *id);
                    }
                }
                3 if count > 3 => {
                    if let Some(id) = self.rng.choice(voters) {
                        count -= 1;
                        change(ConfChangeType::RemoveNode, *id);
                    }
                }
                4 => {
                    if let Some(id) = self.rng.choice(learners) {
                        change(ConfChangeType::RemoveNode, *id);
                    }
                }
                _ => {}
            }
        }
        let mut seen = std::collections::BTreeSet::new();
        changes.retain(|change| seen.insert(change.node_id));
        Ok(())
    }

    /// A new member, empty, waits to be fed by a leader.
    fn join(&mut self) -> Result<u64, crate::ledger::Broken> {
        self.last_id += 1;
        let id = self.last_id;
        self.members.insert(id, Member::new(id));
        self.start(id)?;
        Ok(id)
    }

    /// Those who were removed are switched off, after a while in which they may still disturb.
    pub(crate) fn retire_removed(&mut self) {
        let listed = |world: &Self, id: u64| world.listed(id);
        let known = self.ledger.ever().clone();
        let removed: Vec<u64> = self
            .members
            .values()
            .filter(|member| !member.retired && known.contains(&member.id) && !listed(self, member.id))
            .map(|member| member.id)
            .collect();
        for id in removed {
            let wait = self.rng.u64(100_000..3_000_000);
            self.after(wait, Happening::Retire(id));
        }
    }
}
