//! Somebody else's module, and what can be wrong with one: for the tests.

use spacetimedb::{reducer, ReducerContext, SpacetimeType, Table};

/// Lacks `Profile`.
#[derive(SpacetimeType, Clone, Copy, Debug)]
pub enum ScopeKind {
    Site,
    Module,
    User,
}

#[derive(SpacetimeType, Clone, Debug)]
pub struct Event {
    pub event_id: String,
    pub event_key: String,
    pub scope_kind: ScopeKind,
    pub scope_id: String,
    pub user_id: Option<String>,
    pub owner_user_id: Option<String>,
    pub profile_id: Option<String>,
    pub module_key: Option<String>,
    pub metadata_json: String,
    pub occurred_at_micros: i64,
}

#[spacetimedb::table(name = note)]
pub struct Note {
    #[primary_key]
    pub event_id: String,
    pub text: String,
    pub level: u8,
}

#[derive(SpacetimeType, Clone, Debug)]
pub struct NoteIn {
    pub event_id: String,
    pub text: String,
    pub level: u8,
}

#[reducer]
pub fn lacks_profile(_ctx: &ReducerContext, _events: Vec<Event>) -> Result<(), String> {
    Ok(())
}

#[reducer]
pub fn other_arguments(_ctx: &ReducerContext, _count: u32, _name: String) -> Result<(), String> {
    Ok(())
}

/// Panics at texts that say so, and refuses others without naming the event.
#[reducer]
pub fn record_notes(ctx: &ReducerContext, events: Vec<NoteIn>) -> Result<(), String> {
    for event in events {
        if event.text == "panic" {
            panic!("the note says so");
        }
        if event.text == "refuse" {
            return Err("there is a note that I do not like".into());
        }
        if ctx.db.note().event_id().find(&event.event_id).is_none() {
            ctx.db.note().insert(Note { event_id: event.event_id, text: event.text, level: event.level });
        }
    }
    Ok(())
}
